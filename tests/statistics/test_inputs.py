"""The hooks alone: which inputs count as shared, which rows as tokens, and what the sums are."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from peft.utils import PeftWarning
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from peft_many.files.statistics import InputStatistics
from peft_many.statistics.images import PrototypeHooks
from peft_many.statistics.inputs import CovarianceHooks, MeasuredInputs
from peft_many.statistics.tokens import TokenRows

WIDTH = 6


class Block(nn.Module):
    """Three linear layers, and whatever is to be done with them."""

    def __init__(self, run: Callable[[Any, Tensor], object]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.q, self.k, self.v = nn.Linear(WIDTH, 4), nn.Linear(WIDTH, 5), nn.Linear(WIDTH, 6)
        self.run = run

    def forward(self, hidden: Tensor) -> None:
        self.run(self, hidden)


def inputs(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, WIDTH, generator=torch.Generator().manual_seed(seed))


def second_moment(*rows: Tensor) -> Tensor:
    together = torch.cat([part.double().reshape(-1, part.shape[-1]) for part in rows])
    return together.T @ together / len(together)


def by_layer(measured: MeasuredInputs) -> dict[str, InputStatistics]:
    """What each layer reads; layers that share an input have one object."""
    assert all(measured.input_of[key] == key for key in measured.inputs)
    return {layer: measured.inputs[key] for layer, key in measured.input_of.items()}


def hooked(
    block: Block, batches: list[Tensor], measured: str = "qkv", masks: Any = None, unmasked: Any = (), **options: Any
) -> dict[str, InputStatistics]:
    layers = dict(block.named_children())
    bystanders = {name: layer for name, layer in layers.items() if name not in measured}
    wanted = {name: layers[name] for name in measured}
    with CovarianceHooks(wanted, bystanders, TokenRows(unmasked=unmasked), **options) as hooks, torch.no_grad():
        for batch in batches:
            hooks.begin_batch(masks)
            block(batch)
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in block.modules())
    return by_layer(hooks.result())


def same_input(block: Block, hidden: Tensor) -> None:
    block.q(hidden), block.k(hidden), block.v(hidden)


def test_one_tensor_at_three_layers_is_summed_once() -> None:
    batches = [inputs(2, 3), inputs(1, 5, seed=1)]
    found = hooked(Block(same_input), batches)
    assert found["q"] is found["k"] is found["v"]
    assert found["q"].tokens == 2 * 3 + 5
    assert found["q"].covariance.matrix.dtype == torch.float64
    torch.testing.assert_close(found["q"].covariance.matrix, second_moment(*batches), atol=1e-13, rtol=1e-12)
    assert torch.equal(found["q"].covariance.matrix, found["q"].covariance.matrix.T)


def test_equal_tensors_are_not_the_same_tensor() -> None:
    def copies(block: Block, hidden: Tensor) -> None:
        block.q(hidden), block.k(hidden.clone()), block.v(hidden)

    found = hooked(Block(copies), [inputs(2, 3)])
    assert found["q"] is found["v"]
    assert found["k"] is not found["q"]
    assert torch.equal(found["k"].covariance.matrix, found["q"].covariance.matrix)


def test_sharing_can_be_turned_off() -> None:
    found = hooked(Block(same_input), [inputs(2, 3)], share=False)
    assert len({id(measured) for measured in found.values()}) == 3
    assert set(hooked(Block(same_input), [inputs(2, 3)], measured="q", share=False)) == {"q"}


def test_a_tensor_that_was_changed_in_between_is_another_input() -> None:
    def in_place(block: Block, hidden: Tensor) -> None:
        block.q(hidden)
        hidden.mul_(2)
        block.k(hidden), block.v(hidden)

    first = inputs(2, 3)
    expected = second_moment(first)
    found = hooked(Block(in_place), [first])
    assert found["k"] is found["v"]
    torch.testing.assert_close(found["q"].covariance.matrix, expected)
    torch.testing.assert_close(found["k"].covariance.matrix, 4 * expected)


def test_memory_that_is_used_again_is_another_input() -> None:
    def fresh(block: Block, hidden: Tensor) -> None:
        for layer, factor in ((block.q, 1), (block.k, 2), (block.v, 4)):
            layer(hidden * factor)  # freed at once, so that the next tensor may get its address and its id

    found = hooked(Block(fresh), [inputs(2, 3) for _ in range(4)])
    for name, factor in (("q", 1), ("k", 2), ("v", 4)):
        torch.testing.assert_close(found[name].covariance.matrix, factor**2 * second_moment(inputs(2, 3)))


@pytest.mark.parametrize("measured", ["q", "k", "v"])
def test_unadapted_layers_come_along_if_they_share_a_measured_input(measured: str) -> None:
    # In whichever order they run
    found = hooked(Block(same_input), [inputs(2, 3), inputs(4, 3)], measured=measured)
    assert found["q"] is found["k"] is found["v"]


def test_unadapted_layers_with_an_input_of_their_own_are_left_out() -> None:
    def apart(block: Block, hidden: Tensor) -> None:
        block.q(hidden), block.k(hidden + 1), block.v(hidden + 2)

    assert set(hooked(Block(apart), [inputs(2, 3)], measured="qk")) == {"q", "k"}


def test_an_unadapted_layer_that_also_sees_other_inputs_is_left_out() -> None:
    def twice(block: Block, hidden: Tensor) -> None:
        block.q(hidden), block.k(hidden), block.k(hidden + 1)

    assert set(hooked(Block(twice), [inputs(2, 3)], measured="q")) == {"q"}


def merged_attention(block: Block, hidden: Tensor) -> None:
    encoded = hidden[:, :1] + 1
    block.q(hidden), block.k(hidden), block.v(hidden), block.k(encoded), block.v(encoded)


def test_a_layer_that_reads_the_inputs_of_two_gets_the_sum_of_both() -> None:
    batches = [inputs(2, 3), inputs(1, 5, seed=1)]
    found = hooked(Block(merged_attention), batches)
    assert found["k"] is found["v"]
    assert (found["q"].tokens, found["k"].tokens) == (2 * 3 + 5, 2 * 3 + 5 + 2 + 1)
    torch.testing.assert_close(found["q"].covariance.matrix, second_moment(*batches))
    torch.testing.assert_close(
        found["k"].covariance.matrix, second_moment(*batches, *(batch[:, :1] + 1 for batch in batches))
    )


def test_sums_of_two_inputs_are_what_turning_sharing_off_gives() -> None:
    batches = [inputs(2, 3), inputs(1, 5, seed=1)]
    apart = hooked(Block(merged_attention), batches, share=False)
    for size in (None, 4):
        found = hooked(Block(merged_attention), batches, size=size)
        for name, measured in apart.items():
            assert found[name].tokens == measured.tokens
            assert found[name].covariance.trace == pytest.approx(measured.covariance.trace)
            if size is None:
                torch.testing.assert_close(found[name].covariance.dense(), measured.covariance.dense())


def test_an_unadapted_layer_that_reads_the_inputs_of_two_comes_along_only_if_an_adapted_one_does() -> None:
    assert set(hooked(Block(merged_attention), [inputs(2, 3)], measured="qk")) == {"q", "k", "v"}

    def both(block: Block, hidden: Tensor) -> None:
        other = hidden + 1
        block.q(hidden), block.k(other), block.v(hidden), block.v(other)

    assert set(hooked(Block(both), [inputs(2, 3)], measured="qk")) == {"q", "k"}


def test_layers_that_share_in_some_calls_only_are_an_error_that_says_what_to_do() -> None:
    calls = []

    def sometimes(block: Block, hidden: Tensor) -> None:
        calls.append(hidden)
        block.q(hidden), block.k(hidden if len(calls) == 1 else hidden + 1)

    with pytest.raises(RuntimeError, match=r"'k' shared its input with .* share_inputs=False"):
        hooked(Block(sometimes), [inputs(2, 3), inputs(2, 3, seed=1)])
    calls.clear()
    found = hooked(Block(sometimes), [inputs(2, 3), inputs(2, 3, seed=1)], share=False)
    torch.testing.assert_close(found["k"].covariance.matrix, second_moment(inputs(2, 3), inputs(2, 3, seed=1) + 1))


def test_a_layer_that_runs_twice_on_one_tensor_counts_it_twice() -> None:
    def twice(block: Block, hidden: Tensor) -> None:
        block.q(hidden), block.q(hidden), block.k(hidden + 1)

    found = hooked(Block(twice), [inputs(2, 3)], measured="qk")
    assert found["q"].tokens == 12
    torch.testing.assert_close(found["q"].covariance.matrix, second_moment(inputs(2, 3)))


def test_a_layer_that_never_runs_has_a_covariance_of_zero() -> None:
    def only_q(block: Block, hidden: Tensor) -> None:
        block.q(hidden)

    found = hooked(Block(only_q), [inputs(2, 3)])
    assert found["v"].tokens == 0
    assert not found["v"].covariance.matrix.any()
    assert found["v"].covariance.width == WIDTH


def test_inputs_by_keyword_and_in_inference_mode() -> None:
    def by_keyword(block: Block, hidden: Tensor) -> None:
        with torch.inference_mode():
            hidden = hidden + 1
            block.q(input=hidden), block.k(input=hidden)

    found = hooked(Block(by_keyword), [inputs(2, 3)])
    assert found["q"] is found["k"]
    torch.testing.assert_close(found["q"].covariance.matrix, second_moment(inputs(2, 3) + 1))


@pytest.mark.parametrize("flat", [False, True])
def test_padding_does_not_count(flat: bool) -> None:
    mask = torch.tensor([[0, 0, 1], [1, 1, 1]]).bool()

    def run(block: Block, hidden: Tensor) -> None:
        block.q(hidden.reshape(-1, WIDTH) if flat else hidden)

    found = hooked(Block(run), [inputs(2, 3)], measured="q", masks={"attention_mask": mask})
    assert found["q"].tokens == 4
    torch.testing.assert_close(found["q"].covariance.matrix, second_moment(inputs(2, 3)[mask]))


def test_an_input_that_fits_no_mask_is_warned_of_once_if_there_is_padding() -> None:
    def run(block: Block, hidden: Tensor) -> None:
        block.q(hidden[:, :2]), block.k(hidden[:, 1:])

    padded = torch.tensor([[0, 1, 1], [1, 1, 1]]).bool()
    with pytest.warns(PeftWarning, match=r"'q', of shape \(2, 2, 6\), fits no attention mask") as caught:
        found = hooked(Block(run), [inputs(2, 3)], measured="qk", masks={"attention_mask": padded})
    assert len(caught) == 1
    assert found["q"].tokens == 4


def test_no_warning_without_padding_or_where_no_text_arrives(recwarn: pytest.WarningsRecorder) -> None:
    def run(block: Block, hidden: Tensor) -> None:
        block.q(hidden[:, :2]), block.k(hidden)

    hooked(Block(run), [inputs(2, 3)], measured="q", masks={"attention_mask": torch.ones(2, 3).bool()})
    padded = torch.tensor([[0, 1, 1], [1, 1, 1]]).bool()
    # Even a mask that happens to fit is no mask of vision features
    found = hooked(Block(run), [inputs(2, 3)], measured="qk", masks={"attention_mask": padded}, unmasked={"q", "k"})
    assert found["k"].tokens == 6
    assert not recwarn.list


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_activations_that_are_not_finite_are_an_error_unless_they_are_padding(bad: float) -> None:
    batch = inputs(2, 3)
    batch[0, 0, 2] = bad
    mask = {"attention_mask": torch.tensor([[0, 1, 1], [1, 1, 1]]).bool()}
    block = Block(lambda block, hidden: block.q(hidden))
    assert hooked(block, [batch], measured="q", masks=mask)["q"].tokens == 5
    with pytest.raises(RuntimeError, match="'q' holds NaN or Inf"):
        hooked(block, [batch], measured="q")
    assert not block.q._forward_pre_hooks


def test_an_input_of_another_width_is_an_error() -> None:
    class Odd(nn.Linear):
        def forward(self, hidden: Tensor) -> Tensor:
            return hidden

    layer = Odd(WIDTH, 2)
    with CovarianceHooks({"odd": layer}, {}), pytest.raises(RuntimeError, match="'odd' has 4 features, not 6"):
        layer(torch.randn(3, 4))


def test_conv1d_layers_have_a_width_too() -> None:
    layer = Conv1D(3, WIDTH)
    with CovarianceHooks({"seen": layer, "unseen": Conv1D(3, WIDTH)}, {}) as hooks:
        layer(inputs(2, 3))
    found = by_layer(hooks.result())
    torch.testing.assert_close(found["seen"].covariance.dense(), second_moment(inputs(2, 3)))
    assert found["unseen"].covariance.width == WIDTH


def test_low_precision_inputs_are_summed_in_float64() -> None:
    layer, batches = nn.Linear(WIDTH, 2).bfloat16(), [inputs(1, 400, seed=s).bfloat16() for s in range(20)]
    with CovarianceHooks({"layer": layer}, {}) as hooks:
        for batch in batches:
            layer(batch)
    torch.testing.assert_close(
        by_layer(hooks.result())["layer"].covariance.dense(), second_moment(*batches), atol=1e-13, rtol=1e-12
    )


class Translator(nn.Module):
    """An encoder and a decoder whose cross-attention reads what the encoder gave, both sides of the same length."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(WIDTH, WIDTH))
        self.decoder, self.cross = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, source: Tensor, target: Tensor) -> None:
        encoded = self.encoder(source)
        self.decoder(target)
        self.cross(encoded)


def test_each_side_of_an_encoder_decoder_has_its_own_mask() -> None:
    model, source, target = Translator(), inputs(2, 3), inputs(2, 3, seed=1)
    masks = {
        "attention_mask": torch.tensor([[1, 1, 0], [1, 1, 1]]).bool(),
        "decoder_attention_mask": torch.tensor([[1, 0, 0], [1, 1, 0]]).bool(),
    }
    layers = {"encoder": model.encoder[0], "decoder": model.decoder, "cross": model.cross}
    with CovarianceHooks(layers, {}, TokenRows(text_encoder=model.encoder)) as hooks, torch.no_grad():
        hooks.begin_batch(masks)
        model(source, target)
    found, encoded = by_layer(hooks.result()), model.encoder(source).detach()
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in model.modules())
    reference = {"encoder": (source, "attention_mask"), "decoder": (target, "decoder_attention_mask")}
    reference["cross"] = (encoded, "attention_mask")
    for name, (rows, mask) in reference.items():
        assert found[name].tokens == masks[mask].sum()
        torch.testing.assert_close(found[name].covariance.dense(), second_moment(rows[masks[mask]]))


def test_prototypes_are_means_over_images_not_over_batches() -> None:
    layer = nn.Linear(WIDTH, 2)
    batches = [inputs(3, 4), inputs(1, 4, seed=1)]
    with PrototypeHooks({"projector": layer, "idle": nn.Linear(2, 2)}) as hooks:
        for batch in batches:
            layer(batch)
    found = hooks.result()
    assert set(found) == {"projector"}
    pooled = found["projector"]
    assert pooled.count == 4
    torch.testing.assert_close(pooled.total / 4, torch.cat(batches).double().mean((0, 1)), atol=1e-7, rtol=1e-6)
    assert not layer._forward_pre_hooks


def test_vision_features_that_are_not_finite_are_an_error() -> None:
    layer = nn.Linear(WIDTH, 2)
    with PrototypeHooks({"projector": layer}) as hooks:
        layer(inputs(1, 2) / 0)
    for told in (lambda: hooks.check().refuse(), hooks.result):
        with pytest.raises(RuntimeError, match="'projector' hold NaN or Inf"):
            told()
