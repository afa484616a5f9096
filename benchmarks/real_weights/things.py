"""What the tasks' pictures show: things by group and countries by code; all of them are drawn in every style."""

from __future__ import annotations

_ANIMALS = """
    ant bat bear bird butterfly camel cat chicken cow crab crocodile deer dog dolphin duck elephant fish fox frog goat
    gorilla honeybee horse koala leopard lion lizard monkey mouse octopus owl panda penguin pig rabbit rooster scorpion
    shark snail snake spider squid tiger turtle whale wolf
"""
_PLANTS = "cactus deciduous-tree four-leaf-clover maple-leaf mushroom palm-tree rose sunflower tulip"
_FOOD = """
    banana bread carrot cheese-wedge cherries cookie croissant doughnut ear-of-corn eggplant grapes hamburger hot-dog
    lemon lollipop peach pear pineapple pizza popcorn red-apple strawberry sushi tomato watermelon
"""
_VEHICLES = """
    airplane ambulance automobile bicycle bus canoe fire-engine helicopter locomotive motorcycle police-car rocket
    sailboat tractor tram
"""
_TOOLS = """
    balloon bell camera candle crown dress drum envelope gem-stone glasses guitar hammer key laptop
    light-bulb microscope mobile-phone necktie pencil saxophone scissors television trumpet umbrella violin
"""
_WORDS = {  # where a name is not what people say
    "deciduous-tree": "tree",
    "cheese-wedge": "cheese",
    "ear-of-corn": "corn",
    "red-apple": "apple",
    "automobile": "car",
    "locomotive": "train",
    "gem-stone": "diamond",
    "mobile-phone": "phone",
    "honeybee": "bee",
    "four-leaf-clover": "clover",
    "maple-leaf": "leaf",
    "fire-engine": "fire engine",
    "police-car": "police car",
}
_GROUPS = {"animal": _ANIMALS, "plant": _PLANTS, "food": _FOOD, "vehicle": _VEHICLES, "object": _TOOLS}

GROUP_OF = {name: group for group, names in _GROUPS.items() for name in names.split()}

# What scenes are made of: a picture shows two of them, and both must be told.
IN_SCENES = """
    banana bear bell bicycle bus cactus camera car cat cow crown dog duck elephant fish fox guitar hamburger horse key
    lemon lion monkey mushroom owl panda penguin pig pizza rocket rose snail strawberry tiger tree turtle umbrella
    whale
"""

_COUNTRIES = """
    ar au at bd be br bg ca cl cn co hr cu cz dk eg et fi fr de gh gr hu is in id ie il it jm jp ke kr kz lb my mx
    ma np nl nz ng no pk pe ph pl pt qa ro ru sa sn rs sg sk za es lk se ch tz th tn tr ua ae gb us uy ve vn zm zw
"""
COUNTRIES = tuple(_COUNTRIES.split())


def word(name: str) -> str:
    """What people call the drawing of that name."""
    return _WORDS.get(name, name.replace("-", " "))


def scenery() -> list[str]:
    """The names of the drawings in scenes."""
    words = IN_SCENES.split()
    return sorted(name for name in GROUP_OF if word(name) in words)
