"""Classes, textures, colours and shapes of what stands in the synthetic scenes."""

SKY, GROUND, ROAD, BUILDING, TREE, POLE, PERSON, VEHICLE = range(8)
FLAT, GRAIN, BLOTCH, CLOUD, SIDING, BRICKWORK = range(6)

COLOURS = {
    "asphalt": (84, 86, 92), "azure": (120, 168, 214), "brick": (152, 88, 68), "crimson": (160, 50, 52),
    "dusk": (226, 174, 144), "leaf": (88, 118, 62), "mud": (108, 88, 70), "navy": (52, 66, 104),
    "olive": (120, 118, 70), "pale": (204, 214, 224), "rust": (164, 108, 58), "sand": (198, 176, 136),
    "slate": (104, 114, 128), "snow": (228, 230, 232), "stone": (156, 152, 146), "straw": (188, 168, 98),
    "teal": (76, 116, 114),
}  # fmt: skip
MATERIALS = {
    SKY: ("azure", "azure", "azure", "azure", "pale", "pale", "dusk"),
    GROUND: ("leaf", "leaf", "leaf", "olive", "olive", "straw", "sand", "sand", "stone", "snow"),
    ROAD: ("asphalt", "asphalt", "asphalt", "asphalt", "slate", "slate", "stone", "mud"),
    BUILDING: ("brick", "brick", "brick", "rust", "rust", "sand", "dusk", "stone", "teal", "pale", "azure"),
    TREE: ("leaf", "leaf", "leaf", "olive", "olive", "rust", "straw", "teal"),
    POLE: ("asphalt", "asphalt", "asphalt", "asphalt", "navy", "mud", "pale"),
    PERSON: ("crimson", "crimson", "navy", "navy", "teal", "straw", "snow", "rust", "asphalt"),
    VEHICLE: ("crimson", "crimson", "navy", "azure", "straw", "snow", "snow", "teal", "slate", "asphalt"),
}

# (share of the length, metres above the wall) between the wall's upper corners.
ROOFS = (
    (),
    ((0.5, 3.2),),
    ((0.25, 0), (0.25, 2.5), (0.7, 2.5), (0.7, 0)),
    ((0.15, 0), (0.15, 1.6), (0.22, 1.6), (0.22, 0), (0.75, 0), (0.75, 1.6), (0.82, 1.6), (0.82, 0)),
    tuple((i // 2 / 7, 0.9 * ((i - 1) // 2 % 2)) for i in range(2, 14)),
)
# Side views, (metres along, metres up) from tail to nose: saloon, hatchback, van, bus.
BODIES = (
    ((0.0, 0.35), (0.0, 0.9), (0.25, 0.95), (0.8, 1.42), (2.3, 1.45), (3.1, 0.95), (4.1, 0.8), (4.2, 0.35)),
    ((0.0, 0.35), (0.0, 1.0), (0.15, 1.55), (2.4, 1.6), (3.0, 1.0), (3.8, 0.9), (3.9, 0.35)),
    ((0.0, 0.4), (0.0, 1.3), (0.1, 2.1), (3.6, 2.1), (4.3, 1.2), (5.0, 1.05), (5.0, 0.4)),
    ((0.0, 0.45), (0.0, 1.5), (0.1, 2.9), (8.8, 2.9), (9.0, 0.45)),
)

FAR = 4000.0

Point = tuple[float, float]
Position = tuple[float, float, float]
Colour = tuple[float, float, float]


def tint(colour: Colour, gain: float) -> Colour:
    return colour[0] * gain, colour[1] * gain, colour[2] * gain


def mix(a: Colour, b: Colour, share: float) -> Colour:
    return a[0] + (b[0] - a[0]) * share, a[1] + (b[1] - a[1]) * share, a[2] + (b[2] - a[2]) * share
