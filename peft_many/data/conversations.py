"""A row of somebody's data, in any format that is known, as conversations that end in an answer."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

Message = dict[str, Any]
IMAGE_MARK = "<image>"
_ROLES = {"human": "user", "gpt": "assistant"}
_QUESTIONS = ("question", "text")
_ANSWERS = ("answer", "answers", "caption", "captions")
_READ = {"images", "image", "messages", "conversations", "prompt", "completion", *_QUESTIONS, *_ANSWERS}
_IMAGE_ENDINGS = (".bmp", ".gif", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp")


@dataclass(frozen=True)
class Example:
    """A conversation up to one answer.

    Args:
        messages (`Sequence[Message]`): Everything before the answer; every content is a list of parts.
        answer (`str`): What the assistant says next.
        images (`Sequence`): In the order of the image parts, as [`opened`] takes them.
        references (`Sequence[str]`): All answers that count as right, if there are several.
    """

    messages: Sequence[Message]
    answer: str
    images: Sequence[Any] = ()
    references: Sequence[str] = ()

    @property
    def question(self) -> str:
        """The words of the last message."""
        return " ".join(part["text"] for part in self.messages[-1]["content"] if part["type"] == "text")

    @property
    def right(self) -> Sequence[str]:
        """All answers that count as right."""
        return self.references or (self.answer,)


def question_about(images: Sequence[Any], question: str) -> Example:
    """A question without an answer, about images that stand before it."""
    content = [*({"type": "image"} for _ in images), {"type": "text", "text": question}]
    return Example(({"role": "user", "content": content},), "", tuple(images))


def examples_of(row: Mapping[str, Any], find: Callable[[Any], Any]) -> Iterator[Example]:
    """The conversations of a row: one that ends at each answer of the assistant; `find` knows where an image is.

    Raises:
        ValueError: The row is in no format that is known; a `KeyError`, `TypeError` and the like may say that too.
    """
    named: Any = next((row[name] for name in ("images", "image") if row.get(name) is not None), [])
    beside = list(named) if isinstance(named, (list, tuple)) else [named]
    turns = [(message["role"], _parts(message["content"])) for message in _messages(row)]
    if beside and not any(part["type"] == "image" for _, parts in turns for part in parts):
        first = next(parts for role, parts in turns if role == "user")
        first[:0] = [{"type": "image"} for _ in beside]
    references = tuple(_references(row))
    before: list[Message] = []
    images: list[Any] = []
    for role, parts in turns:
        if role == "assistant":
            if not before:
                raise ValueError("the conversation begins with the assistant")
            answer = "".join(part["text"] for part in parts).strip()
            yield Example(tuple(before), answer, tuple(images), references)
        for part in parts:
            if part["type"] == "image":
                own = part.pop("image", None)
                images.append(find(beside.pop(0) if own is None else own))
        before.append({"role": role, "content": parts})
    if beside:
        raise ValueError(f"it has more images than its text has places for; '{beside[0]}' is left over")


def images_elsewhere(row: Mapping[str, Any]) -> list[str]:
    """The columns of a row that hold an image, or its name, and are not read."""
    return [name for name, value in row.items() if name not in _READ and _is_image(value)]


def _is_image(value: Any) -> bool:
    if isinstance(value, str):
        return value.lower().endswith(_IMAGE_ENDINGS)
    return hasattr(value, "getbbox") or (isinstance(value, Mapping) and value.keys() == {"bytes", "path"})


def _messages(row: Mapping[str, Any]) -> list[Message]:
    if row.get("messages"):
        return list(row["messages"])
    if row.get("conversations"):
        return [_turn(turn) for turn in row["conversations"]]
    if "prompt" in row and "completion" in row:
        return [*_said("user", row["prompt"]), *_said("assistant", row["completion"])]
    question = next((row[name] for name in _QUESTIONS if row.get(name) is not None), None)
    references = _references(row)
    if question is None or not references:
        raise ValueError(
            f"it has the columns {', '.join(map(repr, row)) or '(none)'}, but 'messages' or 'conversations' are "
            "expected, or 'prompt' and 'completion', or 'question' (or 'text') and 'answer'"
        )
    most_frequent = Counter(references).most_common(1)[0][0]  # the first one, if none is
    return [{"role": "user", "content": question}, {"role": "assistant", "content": most_frequent}]


def _turn(turn: Mapping[str, Any]) -> Message:
    """A turn of LLaVA's, or of those who call it messages."""
    role = turn["from"] if "from" in turn else turn["role"]
    return {"role": _ROLES.get(role, role), "content": turn["value"] if "value" in turn else turn["content"]}


def _said(role: str, content: Any) -> list[Message]:
    return [{"role": role, "content": content}] if isinstance(content, str) else list(content)


def _references(row: Mapping[str, Any]) -> list[str]:
    """What a row beside its conversation says that is right: one answer, or several as in VQA and captions."""
    found: Any = next((row[name] for name in _ANSWERS if row.get(name) is not None), [])
    several = list(found) if isinstance(found, (list, tuple)) else [found]
    return [str(one["answer"] if isinstance(one, Mapping) else one) for one in several]


def _parts(content: str | Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Text with image marks as parts; parts without what is empty in them, as `datasets` writes it."""
    if not isinstance(content, str):
        return [_part({key: value for key, value in part.items() if value is not None}) for part in content]
    parts: list[dict[str, Any]] = []
    for position, text in enumerate(content.split(IMAGE_MARK)):
        parts += [{"type": "image"}] if position else []
        parts += [{"type": "text", "text": text.strip()}] if text.strip() else []
    return parts


def _part(part: dict[str, Any]) -> dict[str, Any]:
    """A part with its image, if it is one and has it, under `image`: there are several names for that."""
    if part["type"] == "text":
        return {"type": "text", "text": part["text"]}
    if part["type"] not in ("image", "image_url"):
        raise ValueError(f"a part of type '{part['type']}' is neither text nor an image")
    image = next((part[name] for name in ("image", "path", "url", "image_url") if name in part), None)
    if part["type"] == "image_url" and isinstance(image, Mapping):
        image = image["url"]
    return {"type": "image"} if image is None else {"type": "image", "image": image}
