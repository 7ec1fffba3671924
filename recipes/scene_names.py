"""The words of the emoji scenes: names, relations and ground colours.

The names are plain count nouns that a small LM knows, nearly all of them one of its tokens, and
both vendors draw the same kind of thing under each. Left out for that reason: plurals ("grapes"),
mass nouns ("bread"), look-alikes (ship and boat) and code points that the vendors read differently
(U+1F411 is a sheep to one and a ram to the other).
"""

CODE_POINTS = {
    # food
    "apple": 0x1F34E,
    "banana": 0x1F34C,
    "lemon": 0x1F34B,
    "watermelon": 0x1F349,
    "strawberry": 0x1F353,
    "pineapple": 0x1F34D,
    "carrot": 0x1F955,
    "mushroom": 0x1F344,
    "hamburger": 0x1F354,
    "pizza": 0x1F355,
    "cake": 0x1F382,
    "cookie": 0x1F36A,
    "donut": 0x1F369,
    # plants
    "tree": 0x1F333,
    "cactus": 0x1F335,
    "sunflower": 0x1F33B,
    # animals
    "cat": 0x1F431,
    "dog": 0x1F436,
    "pig": 0x1F437,
    "horse": 0x1F434,
    "frog": 0x1F438,
    "rabbit": 0x1F430,
    "lion": 0x1F981,
    "panda": 0x1F43C,
    "fox": 0x1F98A,
    "elephant": 0x1F418,
    "giraffe": 0x1F992,
    "zebra": 0x1F993,
    "penguin": 0x1F427,
    "owl": 0x1F989,
    "fish": 0x1F41F,
    "octopus": 0x1F419,
    "crab": 0x1F980,
    "turtle": 0x1F422,
    "snail": 0x1F40C,
    "bee": 0x1F41D,
    "butterfly": 0x1F98B,
    "spider": 0x1F577,
    "dinosaur": 0x1F996,
    # vehicles
    "car": 0x1F697,
    "bus": 0x1F68C,
    "train": 0x1F682,
    "tractor": 0x1F69C,
    "bicycle": 0x1F6B2,
    "airplane": 0x2708,
    "helicopter": 0x1F681,
    "rocket": 0x1F680,
    "boat": 0x26F5,
    # places and furniture
    "house": 0x1F3E0,
    "castle": 0x1F3F0,
    "tent": 0x26FA,
    "door": 0x1F6AA,
    # devices and tools
    "key": 0x1F511,
    "lock": 0x1F512,
    "hammer": 0x1F528,
    "phone": 0x1F4F1,
    "camera": 0x1F4F7,
    "television": 0x1F4FA,
    "clock": 0x23F0,
    "magnet": 0x1F9F2,
    "bomb": 0x1F4A3,
    "anchor": 0x2693,
    # music, toys and wear
    "guitar": 0x1F3B8,
    "drum": 0x1F941,
    "balloon": 0x1F388,
    "basketball": 0x1F3C0,
    "robot": 0x1F916,
    "snowman": 0x26C4,
    "pumpkin": 0x1F383,
    "umbrella": 0x2602,
    "crown": 0x1F451,
    "shirt": 0x1F455,
    "shoe": 0x1F45F,
    "hat": 0x1F3A9,
    "backpack": 0x1F392,
    # further
    "book": 0x1F4D5,
    "candle": 0x1F56F,
    "star": 0x2B50,
    "rainbow": 0x1F308,
    "heart": 0x2764,
}

# Read as: the first object is <relation> the second.
INVERSE_RELATION = {
    "to the left of": "to the right of",
    "to the right of": "to the left of",
    "above": "below",
    "below": "above",
}

# Centres in RGB; far enough apart that no jitter of a few levels changes the word for it.
GROUND_COLOURS = {
    "red": (205, 45, 45),
    "green": (60, 165, 75),
    "blue": (50, 90, 205),
    "yellow": (242, 214, 60),
    "purple": (135, 65, 165),
    "white": (242, 242, 242),
}
