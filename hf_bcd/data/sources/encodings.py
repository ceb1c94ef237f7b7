"""Tables of the ids and colours that the masks of known data sets hold."""

from ..labels import IGNORE_INDEX, ColourId


# Stored id, class id, colour: cityscapesScripts, helpers/labels.py. The licence plate, id -1, is never drawn.
_CITYSCAPES = (
    (0, 255, (0, 0, 0)), (1, 255, (0, 0, 0)), (2, 255, (0, 0, 0)), (3, 255, (0, 0, 0)), (4, 255, (0, 0, 0)),
    (5, 255, (111, 74, 0)), (6, 255, (81, 0, 81)), (7, 0, (128, 64, 128)), (8, 1, (244, 35, 232)),
    (9, 255, (250, 170, 160)), (10, 255, (230, 150, 140)), (11, 2, (70, 70, 70)), (12, 3, (102, 102, 156)),
    (13, 4, (190, 153, 153)), (14, 255, (180, 165, 180)), (15, 255, (150, 100, 100)), (16, 255, (150, 120, 90)),
    (17, 5, (153, 153, 153)), (18, 255, (153, 153, 153)), (19, 6, (250, 170, 30)), (20, 7, (220, 220, 0)),
    (21, 8, (107, 142, 35)), (22, 9, (152, 251, 152)), (23, 10, (70, 130, 180)), (24, 11, (220, 20, 60)),
    (25, 12, (255, 0, 0)), (26, 13, (0, 0, 142)), (27, 14, (0, 0, 70)), (28, 15, (0, 60, 100)), (29, 255, (0, 0, 90)),
    (30, 255, (0, 0, 110)), (31, 16, (0, 80, 100)), (32, 17, (0, 0, 230)), (33, 18, (119, 11, 32)),
)  # fmt: skip
CITYSCAPES_IDS = tuple((stored, train_id) for stored, train_id, _ in _CITYSCAPES)
# Where two ids share a colour, the first is taken: a group of poles (18, void) reads as poles (17).
CITYSCAPES_COLOURS: tuple[ColourId, ...] = tuple((colour, stored) for stored, _, colour in _CITYSCAPES)


def _voc_colours() -> tuple[ColourId, ...]:
    """VOC spreads the bits of an id, in groups of three, over the highest bits of red, green and blue."""

    def channel(index: int, first: int) -> int:
        return sum((index >> first + 3 * place & 1) << 7 - place for place in range(3))

    ids = (*range(21), IGNORE_INDEX)
    return tuple(((channel(index, 0), channel(index, 1), channel(index, 2)), index) for index in ids)


VOC_COLOURS = _voc_colours()

# Of the 91 things that were planned, COCO annotates 80; COCO-Stuff adds 91 stuff classes after all 91 of them.
_PLANNED_THINGS = range(1, 92)
_NEVER_ANNOTATED = (12, 26, 29, 30, 45, 66, 68, 69, 71, 83, 91)
COCO_THINGS = tuple(index for index in _PLANNED_THINGS if index not in _NEVER_ANNOTATED)
# panoptic_coco_categories.json of panopticapi: 53 stuff classes, of which 17 are merged ones (183..200).
COCO_PANOPTIC = COCO_THINGS + (
    92, 93, 95, 100, 107, 109, 112, 118, 119, 122, 125, 128, 130, 133, 138, 141, 144, 145, 147, 148, 149, 151, 154,
    155, 156, 159, 161, 166, 168, 171, 175, 176, 177, 178, 180, 181, *range(184, 201),
)  # fmt: skip
# labels.txt of COCO-Stuff: 0 is "unlabeled"; the ids of things that were never annotated do not occur.
COCO_STUFF_10K_IDS = (
    (0, IGNORE_INDEX),
    *((stored, index) for index, stored in enumerate((*COCO_THINGS, *range(92, 183)))),
)
