"""What stands in the synthetic scenes: classes, colours, and painters of roads, houses, plants, poles and traffic.

Painters called `paint_...` paint at once. Those called `place_...` note each thing with its depth, for the scene to
paint it when all farther ones are there.
"""

import math
from collections.abc import Iterable, Sequence
from itertools import pairwise

from . import materials as m
from .scene import Scene


def _rectangle(left: float, right: float, near: float, far: float) -> list[m.Position]:
    """Corners of a rectangle on the ground."""
    return [(left, 0, near), (left, 0, far), (right, 0, far), (right, 0, near)]


def paint_sky(scene: Scene) -> None:
    low = m.mix(scene.haze, m.COLOURS["snow"], scene.random())
    sky = scene.surface(m.SKY, scene.colour(m.SKY), 0, scene.pick((m.CLOUD, m.CLOUD, m.CLOUD, m.FLAT)), low)
    scene.draw.rectangle((0, 0, scene.width, scene.height), fill=sky)


def paint_hills(scene: Scene, z: float) -> None:
    surface = scene.surface(m.GROUND, scene.colour(m.GROUND), z / 10, m.BLOTCH, scene.uniform(-0.3, 0.3))
    span = 1.2 * z * scene.width / scene.focal
    ridge = [scene.uniform(0.0, 0.07) * z for _ in range(10)]
    # Corners cut twice (Chaikin) round the ridge.
    points = [(span * (i / 9 - 0.5), y) for i, y in enumerate(ridge)]
    for _ in range(2):
        pairs = pairwise(points)
        points = [(a[0] + t * (b[0] - a[0]), a[1] + t * (b[1] - a[1])) for a, b in pairs for t in (0.25, 0.75)]
    scene.polygon(surface, [(-span, -z, z), *((x, y, z) for x, y in points), (span, -z, z)])


def paint_plain(scene: Scene) -> None:
    plain = scene.surface(
        m.GROUND, scene.colour(m.GROUND), 12, scene.pick((m.GRAIN, m.BLOTCH)), scene.uniform(-0.35, 0.35)
    )
    scene.polygon(plain, _rectangle(-m.FAR, m.FAR, 0.8, m.FAR))


def paint_road(scene: Scene) -> None:
    """Road along z; outside parks with pavements, markings and, at times, a crossing road."""
    end = scene.far_limit if scene.style == "square" else 400.0
    steps = (0.8, 1.5, 2.2, 3, 4, 5.5, 7.5, 10, 13, 17, 22, 28, 36, 46, 60, 80, 120, 200)
    depths = [*(z for z in steps if z < end), end]

    def ribbon(surface: int, side: float, left: float, right: float) -> None:
        edge = [(scene.kerb(side, z) + left, 0, z) for z in depths]
        scene.polygon(surface, edge + [(x + right - left, y, z) for x, y, z in reversed(edge)])

    colour, paved = scene.colour(m.ROAD), scene.style != "park"
    asphalt = scene.surface(m.ROAD, colour, 10, m.GRAIN, scene.uniform(-0.15, 0.15))
    if paved and scene.chance(0.6):
        z = scene.uniform(9, 30)
        scene.polygon(asphalt, _rectangle(-m.FAR, m.FAR, z, z + scene.uniform(5, 10)))
    if paved:
        width, flags = scene.uniform(1.6, 4.0), scene.colour(m.GROUND)
        pavement = scene.surface(m.GROUND, flags, 10, m.GRAIN, scene.uniform(-0.2, 0.2))
        joint = scene.surface(m.GROUND, m.tint(flags, 0.75), 10)
        for side in (-1, 1):
            ribbon(pavement, side, 0, side * width)
            for z in [2 + 1.1 * i for i in range(12) if 2 + 1.1 * i < end]:
                x = scene.kerb(side, z)
                scene.bar(joint, (x, 0, z), (x + side * width, 0, z), 0)
    ribbon(asphalt, 0, -scene.road_half_width, scene.road_half_width)
    paint = scene.surface(m.ROAD, m.mix(colour, m.COLOURS["snow"], scene.uniform(0.5, 0.9)), 10)
    if paved and scene.chance(0.75):
        for z in [2 + 3.5 * i for i in range(14) if 4 + 3.5 * i < end]:
            scene.polygon(paint, _rectangle(scene.kerb(0, z) - 0.09, scene.kerb(0, z) + 0.09, z, z + 1.8))
    if paved and scene.chance(0.35):
        z, stripe = scene.uniform(4.5, 14), scene.road_half_width / 8
        for i in range(8):
            left = scene.kerb(-1, z) + (2 * i + 0.5) * stripe
            scene.polygon(paint, _rectangle(left, left + stripe, z, z + 2.6))


def paint_skyline(scene: Scene) -> None:
    """Row of facades across the view."""
    square = scene.style == "square"
    z = scene.far_limit = scene.uniform(13, 28) if square else scene.uniform(38, 60)
    x, end = ((edge - scene.centre) / scene.scale(z) for edge in (0, scene.width))
    x -= scene.uniform(0, 8)
    while x < end:
        length = scene.uniform(5, 14)
        if not scene.chance(0.15 if square else 0.4):
            height = scene.uniform(3.5, 12.5) * (1 if square else scene.uniform(0.8, 2.0))
            _facade(scene, (x, z), (x + length, z), height, scene.colour(m.BUILDING), scene.pick(m.ROOFS))
        x += length


def paint_terrace(scene: Scene, side: int) -> None:
    """Houses along one side of the street, in perspective."""
    setback = scene.setback[side] = scene.uniform(1.5, 5.0)
    z, houses = scene.uniform(2, 9), []
    while z < 60:
        houses.append((z, z + scene.uniform(6, 16)))
        z = houses[-1][1] + (scene.uniform(2, 9) if scene.chance(0.4) else 0)
    light = scene.uniform(0.6, 0.85) if side == scene.sun_side else scene.uniform(0.85, 1.1)
    for near, far in reversed(houses):
        height, wall = scene.uniform(4.5, 14), scene.colour(m.BUILDING)
        front = scene.kerb(side, (near + far) / 2) + side * (setback + scene.uniform(0, 0.6))
        if side == scene.sun_side:
            scene.shadow(_rectangle(front, front - side * 0.6 * height, near, far))
        _facade(scene, (front, far), (front, near), height, m.tint(wall, light))
        left, right = sorted((front, front + side * 9))
        _facade(scene, (left, near), (right, near), height, m.tint(wall, 0.8 * light), scene.pick(m.ROOFS))


def _facade(scene: Scene, a: m.Point, b: m.Point, height: float, wall: m.Colour, roof: Iterable[m.Point] = ()) -> None:
    """Upright wall from ground point a to b (x, z): windows, a roof line, at times a passage to look through."""
    (ax, az), (bx, bz) = a, b
    length, z = math.hypot(bx - ax, bz - az), (az + bz) / 2

    def at(u: float, y: float) -> m.Point:
        return scene.project(ax + u * (bx - ax), y, az + u * (bz - az))

    vague = scene.chance(0.15)
    texture = scene.pick((m.GRAIN, m.SIDING, m.SIDING, m.BRICKWORK, m.BRICKWORK))
    surface = scene.surface(m.BUILDING, wall, z, texture, scene.uniform(-0.35, 0.25), vague)
    rise = scene.uniform(0.6, 1.4)
    outline = [(0, 0), (0, height), *((u, height + rise * y) for u, y in roof), (1, height), (1, 0)]
    left = right = 0.0
    if scene.chance(0.25) and length > 6:
        width, top = scene.uniform(2.0, 3.6) / length, min(0.75 * height, scene.uniform(2.6, 4.5))
        left = scene.uniform(0.12, 0.86 - width)
        right = left + width
        arch = [(right - width * t, top - (2 * t - 1) ** 2) for t in (0, 0.15, 0.35, 0.5, 0.65, 0.85, 1)]
        outline += [(right, 0), *arch, (left, 0)]
    scene.draw.polygon([at(u, y) for u, y in outline], fill=surface)

    reflection = m.mix(wall, scene.haze, scene.uniform(0.35, 0.75))
    glass = [scene.pick((m.tint(wall, 0.45), reflection)) for _ in range(2)]
    panes = [scene.surface(m.BUILDING, colour, z, m.CLOUD, 0.3, vague) for colour in glass]
    columns, rows = min(9, int(length / scene.uniform(1.9, 3.2))), min(5, int((height - 0.6) / 2.9))
    half, tall, sill = scene.uniform(0.15, 0.35), scene.uniform(1.1, 2.0), scene.uniform(0.7, 1.1)
    for i in range(columns):
        u0, u1 = (i + 0.5 - half) / columns, (i + 0.5 + half) / columns
        if left - 0.02 < u1 and u0 < right + 0.02:
            continue
        for j in range(rows):
            y0, y1 = sill + 2.9 * j, sill + 2.9 * j + tall
            scene.draw.polygon([at(u0, y0), at(u0, y1), at(u1, y1), at(u1, y0)], fill=panes[(5 * i + 3 * j) % 7 > 3])


def place_plants(scene: Scene) -> None:
    design = scene.pick(("bare", "leafy", "leafy", "conifer", "mixed"))
    for _ in range(int(scene.uniform(4, 10) if scene.style == "park" else scene.uniform(1, 6))):
        z, side = scene.depth(6, min(50, scene.far_limit)), scene.pick((-1, 1))
        spread = 14 if scene.style == "park" else min(8, scene.setback[side] - 0.3)
        x = scene.kerb(side, z) + side * scene.uniform(0.7, spread)
        kind = scene.pick(("bare", "leafy", "leafy", "conifer")) if design == "mixed" else design
        scene.place(z, _tree, x, z, kind)
    if scene.style != "street" and scene.chance(0.4):
        z = scene.depth(7, min(30, scene.far_limit))
        scene.place(z, _hedge, z)


def _tree(scene: Scene, x: float, z: float, kind: str) -> None:
    height, vague = scene.uniform(3.5, 8.5), kind != "bare" and scene.chance(0.2)
    (foot_x, foot_y), size = scene.project(x, 0, z), height * scene.scale(z)
    bark = scene.surface(m.TREE, m.tint(scene.colour(m.TREE), 0.7), z, m.BLOTCH, -0.25, vague)
    leaves = _leaves(scene, z, vague)
    scene.shadow((x + 0.3 * height * u, 0, z + 0.2 * height * v) for u, v in scene.blobs[0])
    if kind == "conifer":
        scene.line(bark, [(foot_x, foot_y), (foot_x, foot_y - 0.3 * size)], 0.04 * size)
        tiers, width = scene.pick((4, 5, 6)), scene.uniform(0.16, 0.24)
        heights = [(i + 0.5 * tip) / tiers for i in range(tiers) for tip in (0, 1)]
        reaches = [width * (1 - v) * (1.0 if i % 2 == 0 else 0.55) for i, v in enumerate(heights)]
        flank = list(zip(reaches, heights, strict=True))
        outline = [(scene.uniform(0.85, 1.1) * u, v) for u, v in flank] + [(0.0, 1.0)]
        outline += [(-scene.uniform(0.85, 1.1) * u, v) for u, v in reversed(flank)]
        points = [(foot_x + u * size, foot_y - (0.12 + 0.88 * v) * size) for u, v in outline]
        scene.draw.polygon(points, fill=leaves[0])
        return
    forks: list[m.Point] = []
    levels, angle = (5 if kind == "bare" else 4) - (z > 22), scene.uniform(-0.15, 0.15) - math.pi / 2
    _limb(scene, bark, (foot_x, foot_y), angle, 0.3 * size, 0.045 * size, levels, forks)
    if kind == "leafy":
        _foliage(scene, leaves, forks, size * scene.uniform(0.06, 0.1))


def _limb(
    scene: Scene,
    bark: int,
    start: m.Point,
    angle: float,
    length: float,
    width: float,
    levels: int,
    forks: list[m.Point],
) -> None:
    """Limb on the canvas that forks `levels` times; appends its outer forks and ends to `forks`."""
    end = (start[0] + length * math.cos(angle), start[1] + length * math.sin(angle))
    scene.line(bark, (start, end), width)
    if levels <= 1:
        forks.append(end)
    if levels == 0:
        return
    for turn in (-1, 1):
        turned = angle + turn * scene.uniform(0.2, 0.65)
        _limb(scene, bark, end, turned, length * scene.uniform(0.62, 0.88), 0.62 * width, levels - 1, forks)


def _leaves(scene: Scene, z: float, vague: bool = False) -> tuple[int, int]:
    """Surfaces of dark and of sunlit leaves."""
    crown = scene.colour(m.TREE)
    dark, sunlit = (scene.surface(m.TREE, m.tint(crown, gain), z, m.BLOTCH, -0.3, vague) for gain in (0.8, 1.1))
    return dark, sunlit


def _foliage(scene: Scene, leaves: tuple[int, int], centres: Sequence[m.Point], size: float) -> None:
    """Clumps of leaves with gaps between them: dark ones, then smaller sunlit ones above."""
    for surface, gain, lift in ((leaves[0], 1.0, 0.0), (leaves[1], 0.7, 0.35)):
        for i, (x, y) in enumerate(centres):
            radius = gain * size * scene.uniform(0.6, 1.3)
            points = [(x + radius * u, y - lift * size + radius * v) for u, v in scene.blobs[i % 8]]
            scene.draw.polygon(points, fill=surface)


def _hedge(scene: Scene, z: float) -> None:
    height, x = scene.uniform(0.5, 1.4), scene.visible_x(z)
    bushes = [scene.project(x + 0.5 * height * i, 0.45 * height, z) for i in range(-6, int(scene.uniform(2, 10)))]
    _foliage(scene, _leaves(scene, z), bushes, 0.5 * height * scene.scale(z))


def paint_overhanging_limb(scene: Scene) -> None:
    """Limb of a tree outside the picture, across its upper part."""
    side, size, angle = scene.pick((0, 1)), scene.uniform(0.5, 0.9) * scene.height, scene.uniform(-0.2, 0.35)
    start, forks = (side * scene.width, scene.uniform(0.0, 0.25) * scene.height), []
    bark = scene.surface(m.TREE, m.tint(scene.colour(m.TREE), 0.6), 3)
    _limb(scene, bark, start, math.pi - angle if side else angle, 0.3 * size, 0.03 * size, 4, forks)
    if scene.chance(0.7):
        _foliage(scene, _leaves(scene, 3), forks, 0.06 * size)


def place_poles(scene: Scene) -> None:
    for side in scene.pick(((-1, 1), (-1, 1), (-1,), (1,))):
        colour, height, arm = scene.colour(m.POLE), scene.uniform(4.5, 7.5), -side * scene.uniform(0.8, 1.8)
        first, spacing, beside = scene.uniform(6, 10), scene.uniform(6, 12), side * scene.uniform(0.3, 1.2)
        carries_wires = scene.chance(0.35)
        # The line of poles goes on behind the camera: the nearest wires leave the picture.
        depths = [1.0] + [z for i in range(5) if (z := first + spacing * i) < min(scene.far_limit, 32)]
        feet = [(scene.kerb(side, z) + beside, z) for z in depths]
        for x, z in feet[1:]:
            scene.place(z, _pole, x, z, height, 0 if carries_wires else arm, colour)
        if carries_wires:
            for a, b in pairwise(feet):
                scene.place(a[1], _wires, a, b, height, colour)
    for _ in range(int(scene.uniform(0, 3))):
        z, side = scene.depth(6, 25), scene.pick((-1, 1))
        x = scene.kerb(side, z) + side * scene.uniform(0.2, min(1.5, scene.setback[side]))
        scene.place(z, _sign_post, x, z)
    if scene.chance(0.35):
        z = scene.depth(6, 16)
        scene.place(z, _railing, z)


def _pole(scene: Scene, x: float, z: float, height: float, arm: float, colour: m.Colour) -> None:
    """Lamp post with an arm of this length, or, without one, a mast with cross-bars."""
    surface = scene.surface(m.POLE, colour, z, m.GRAIN, -0.2)
    scene.bar(surface, (x, 0, z), (x, height + (0 if arm else 0.6), z), 0.15)
    scene.shadow([(x - 0.1, 0, z), (x + 0.1, 0, z), (x - 3 * scene.sun_side, 0, z - 0.6)])
    if arm:
        bow = [scene.project(x + t * arm, height + 0.5 * math.sqrt(t), z) for t in (0.0, 0.15, 0.45, 0.8, 1.0)]
        scene.line(surface, bow, 0.06 * scene.scale(z))
        scene.bar(surface, (x + arm, height + 0.5, z), (x + 1.3 * arm, height + 0.48, z), 0.12)
        return
    for y in (height, height - 0.7):
        scene.bar(surface, (x - 0.9, y, z), (x + 0.9, y, z), 0.07)


def _wires(scene: Scene, a: m.Point, b: m.Point, height: float, colour: m.Colour) -> None:
    """Two sagging wires between poles at (x, z)."""
    surface = scene.surface(m.POLE, m.tint(colour, 0.6), (a[1] + b[1]) / 2)
    # Even steps in 1 / z are even steps in the picture.
    depths = [1 / ((1 - i / 8) / a[1] + i / 8 / b[1]) for i in range(9)]
    path = [((z - a[1]) / (b[1] - a[1]), z) for z in depths]
    for shift in (-0.8, 0.8):
        points = [(a[0] + t * (b[0] - a[0]) + shift, height - 3.6 * t * (1 - t), z) for t, z in path]
        scene.line(surface, [scene.project(*point) for point in points], 0)


def _sign_post(scene: Scene, x: float, z: float) -> None:
    surface, height = scene.surface(m.POLE, scene.colour(m.POLE), z), scene.uniform(2.0, 2.8)
    scene.bar(surface, (x, 0, z), (x, height, z), 0.07)
    scene.bar(surface, (x - 0.3, height, z), (x + 0.3, height, z), 0.11)


def _railing(scene: Scene, z: float) -> None:
    surface, x = scene.surface(m.POLE, scene.colour(m.POLE), z), scene.visible_x(z)
    spacing, count, height = scene.uniform(0.35, 0.8), scene.pick((8, 11, 14)), scene.uniform(0.9, 1.2)
    for i in range(count + 1):
        scene.bar(surface, (x + spacing * i, 0, z), (x + spacing * i, height, z), 0.04)
    for y in (0.45 * height, height):
        scene.bar(surface, (x, y, z), (x + spacing * count, y, z), 0.05)


def place_traffic(scene: Scene) -> None:
    for _ in range(int(scene.uniform(1, 6))):
        z = scene.depth(3.6, min(12, scene.far_limit - 0.5))
        left, right = (scene.kerb(side, z) + side * (scene.setback[side] - 0.3) for side in (-1, 1))
        x = min(max(scene.visible_x(z), left), right)
        scene.place(z, _person, x, z)
    for _ in range(int(scene.uniform(1, 6)) if scene.style != "park" else scene.pick((0, 0, 1))):
        body, across = scene.pick(m.BODIES), scene.chance(0.35)
        # Long bodies keep away, or one of them fills the view.
        nearest, farthest = 5 + body[-1][0] * (0.6 + across), min(24, scene.far_limit - body[-1][0])
        if nearest > farthest:
            continue
        z = scene.depth(nearest, farthest)
        x = scene.kerb(side := scene.pick((-1, 1)), z) - side * 1.2
        scene.place(z, _vehicle, x, z, body, across)


def _person(scene: Scene, x: float, z: float) -> None:
    """Walking figure: head, torso or coat, arms, legs, at times a bag."""
    height, facing, vague = scene.uniform(1.45, 1.9), scene.pick((-1, 1)), scene.chance(0.2)
    (foot_x, foot_y), size = scene.project(x, 0, z), height * scene.scale(z)
    coat, trousers, bag = (scene.surface(m.PERSON, scene.colour(m.PERSON), z, m.BLOTCH, -0.2, vague) for _ in range(3))
    skin = scene.surface(m.PERSON, m.mix((226, 182, 150), (92, 62, 46), scene.random()), z, vague=vague)
    scene.shadow((x - 0.5 * scene.sun_side + 0.5 * u, 0, z + 0.3 * v) for u, v in scene.blobs[0])

    def at(u: float, v: float) -> m.Point:
        return foot_x + facing * u * size, foot_y - v * size

    stride, swing = scene.uniform(0.02, 0.14), scene.uniform(0.03, 0.17)
    for sign in (-1, 1):
        leg = ((0.03 * sign, 0.5), (0.7 * stride * sign + 0.02, 0.25), (stride * sign, 0))
        arm = ((0.09 * sign, 0.78), ((swing + 0.04) * sign, 0.6), (swing * sign + 0.05, 0.45))
        scene.line(trousers, [at(u, v) for u, v in leg], 0.075 * size)
        scene.line(coat, [at(u, v) for u, v in arm], 0.05 * size)
    hem = 0.3 if scene.chance(0.3) else 0.46
    torso = [(-0.1, 0.8), (-0.04, 0.84), (0.04, 0.84), (0.1, 0.8), (0.09, hem), (-0.09, hem)]
    scene.draw.polygon([at(u, v) for u, v in torso], fill=coat)
    scene.disc(skin, at(0, 0.925), 0.065 * size)
    scene.disc(bag, at(-0.01, 0.955), 0.05 * size)
    if scene.chance(0.3):
        left, top, right, bottom = *at(-facing * 0.18, 0.58), *at(-facing * 0.08, 0.45)
        scene.draw.rectangle((left, top, right, bottom), fill=bag)


def _vehicle(scene: Scene, x: float, z: float, body: Sequence[m.Point], across: bool) -> None:
    """Extruded side view, seen from the side (`across`) or from behind with x in its middle."""
    length, height, width = body[-1][0], max(y for _, y in body), 2.3 if body is m.BODIES[-1] else 1.7
    paint, facing = scene.colour(m.VEHICLE), scene.pick((-1, 1))
    vague = scene.chance(0.2)
    flank = scene.surface(m.VEHICLE, paint, z, m.GRAIN, scene.uniform(-0.15, 0.15), vague)
    top = scene.surface(m.VEHICLE, m.tint(paint, scene.uniform(0.8, 1.2)), z, m.GRAIN, 0.1, vague)
    glass = scene.surface(m.VEHICLE, m.mix(m.tint(paint, 0.3), scene.haze, scene.uniform(0.1, 0.6)), z, vague=vague)
    tyre = scene.surface(m.VEHICLE, (40, 40, 44), z, vague=vague)
    lamp = scene.surface(m.VEHICLE, scene.pick(((200, 40, 36), (250, 240, 200))), z, vague=vague)

    def at(along: float, y: float, side: float) -> m.Position:
        # side runs from 0, the visible flank, to 1.
        if across:
            return x + facing * (along - length / 2), y, z + side * width
        return x + (0.5 - side) * (width if x < 0 else -width), y, z + along

    footprint = ((-0.2, -0.2), (-0.2, 1.2), (length + 0.2, 1.2), (length + 0.2, -0.2))
    scene.shadow(at(along, 0, side) for along, side in footprint)
    for side in (1, 0):
        for along in (0.2 * length, 0.8 * length):
            wheel = at(along, 0.36, side)
            scene.disc(tyre, scene.project(*wheel), 0.36 * scene.scale(wheel[2]), 1.0 if across else 0.45)
    for (a0, y0), (a1, y1) in reversed(list(pairwise(body))):
        scene.polygon(top, [at(a0, y0, 0), at(a0, y0, 1), at(a1, y1, 1), at(a1, y1, 0)])
    scene.polygon(flank, [at(a, y, 0) for a, y in body])
    sill, lintel, count = 0.6 * height + 0.06, height - 0.14, 6 if length > 6 else 2
    first, last = (0.04 * length, 0.97 * length) if length > 6 else (0.19 * length, 0.62 * length)
    for i in range(count):
        left, right = first + (last - first) * i / count, first + (last - first) * (i + 0.88) / count
        scene.polygon(glass, [at(left, sill, 0), at(left, lintel, 0), at(right, lintel, 0), at(right, sill, 0)])
    if not across:
        (tail, waist), (slant, roof) = body[1], body[2]
        if roof - waist < 0.3:
            (tail, waist), (slant, roof) = body[2], body[3]
        low, high = waist + 0.05, roof - 0.06
        corners = ((tail, low, 0.1), (slant, high, 0.16), (slant, high, 0.84), (tail, low, 0.9))
        scene.polygon(glass, [at(*corner) for corner in corners])
        for left, right in ((0.04, 0.2), (0.8, 0.96)):
            scene.polygon(lamp, [at(0, 0.66, left), at(0, 0.82, left), at(0, 0.82, right), at(0, 0.66, right)])


def paint_scene(scene: Scene) -> None:
    """Paints one random scene, far to near."""
    paint_sky(scene)
    if scene.chance(0.8 if scene.style == "park" else 0.3):
        paint_hills(scene, scene.pick((900.0, 400.0)))
    paint_plain(scene)
    if scene.style != "street" or scene.chance(0.6):
        paint_skyline(scene)
    paint_road(scene)
    if scene.style == "street":
        for side in scene.pick(((-1, 1), (-1, 1), (-1,), (1,))):
            paint_terrace(scene, side)
    place_plants(scene)
    place_poles(scene)
    place_traffic(scene)
    scene.paint_placed()
    if scene.chance(0.25):
        paint_overhanging_limb(scene)
