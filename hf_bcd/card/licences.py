"""Terms of the models that a student starts from or learns from, and what follows for the student."""

import logging
import re
from collections.abc import Sequence
from contextlib import suppress
from typing import NamedTuple

import timm
import yaml
from huggingface_hub import ModelCard

from ..hub.errors import explained


logger = logging.getLogger(__name__)

NON_COMMERCIAL = re.compile(r"(^|[^a-z])nc([^a-z]|$)|non-?commercial|research|apple-amlr|seer-", re.IGNORECASE)
# what the Hub takes for an identifier; it refuses a card with any other, such as fastvit-license of timm
IDENTIFIERS = frozenset((
    "afl-3.0", "agpl-3.0", "apache-2.0", "artistic-2.0", "bsd", "bsd-2-clause", "bsd-3-clause", "bsl-1.0", "cc",
    "cc-by-2.0", "cc-by-3.0", "cc-by-4.0", "cc-by-nc-2.0", "cc-by-nc-3.0", "cc-by-nc-4.0", "cc-by-nc-nd-4.0",
    "cc-by-nc-sa-3.0", "cc-by-nc-sa-4.0", "cc-by-nd-4.0", "cc-by-sa-3.0", "cc-by-sa-4.0", "cc0-1.0",
    "creativeml-openrail-m", "gemma", "gpl", "gpl-2.0", "gpl-3.0", "isc", "lgpl", "lgpl-2.1", "lgpl-3.0", "mit", "mpl-2.0",
    "openrail", "unlicense", "wtfpl", "zlib",
))  # fmt: skip


class Licence(NamedTuple):
    """Terms of a model."""

    identifier: str  # of the Hub, such as `mit`; `other` for terms that have none
    name: str
    link: str | None = None
    commercial: bool = True  # False if they forbid commercial use


# checkpoints whose terms are easily overlooked, by the beginning of their id; sources: NVlabs/SegFormer (LICENSE),
# facebookresearch/Mask2Former (MODEL_ZOO.md), apple/ml-cvnets (LICENSE), the cards of openmmlab
KNOWN = {
    ("nvidia/segformer-", "nvidia/mit-"): Licence(
        "other",
        "NVIDIA Source Code License for SegFormer (non-commercial)",
        "https://github.com/NVlabs/SegFormer/blob/master/LICENSE",
        commercial=False,
    ),
    ("facebook/mask2former-",): Licence(
        "cc-by-nc-4.0", "CC BY-NC 4.0", "https://creativecommons.org/licenses/by-nc/4.0/", commercial=False
    ),
    ("apple/mobilevit", "apple/deeplabv3-mobilevit"): Licence(
        "other", "Apple Sample Code License", "https://github.com/apple/ml-cvnets/blob/main/LICENSE"
    ),
    ("openmmlab/upernet-",): Licence("mit", "MIT"),
}


def licence_of(repo_id: str) -> Licence | None:
    """Terms of a checkpoint on the Hub: from the table above, timm's registry, or its card; None if unknown."""
    for beginnings, licence in KNOWN.items():
        if repo_id.startswith(beginnings):
            return licence
    if repo_id.startswith("timm/"):
        with suppress(RuntimeError):  # an unknown tag
            stated = getattr(timm.get_pretrained_cfg(repo_id.removeprefix("timm/")), "license", None) or "unknown"
            page = f"https://huggingface.co/{repo_id}"
            return None if stated == "unknown" else from_identifier(stated, address=page)
    try:
        with explained("model", repo_id):
            card = ModelCard.load(repo_id, ignore_metadata_errors=True).data.to_dict()
    except (OSError, ValueError, yaml.YAMLError) as error:  # HubError, or a card that is none
        logger.info("the licence of %s is unknown, because its card cannot be read: %s", repo_id, error)
        return None
    if not isinstance(stated := card.get("license"), str):
        return None
    return from_identifier(stated, card.get("license_name"), card.get("license_link"))


def from_identifier(identifier: str, name: str | None = None, address: str | None = None) -> Licence:
    """Terms as a card or timm's registry states them."""
    return Licence(
        identifier if identifier in IDENTIFIERS else "other",
        str(name or identifier),
        str(address) if address else None,
        commercial=not NON_COMMERCIAL.search(f"{identifier} {name or ''}"),
    )


def student_licence(sources: Sequence[Licence | None]) -> dict[str, str]:
    """Metadata of a card whose model rests on others: the strictest of their terms, nothing where one is unknown."""
    names = {terms and terms.name for terms in sources}
    strictest = next((terms for terms in sources if terms and not terms.commercial), None)
    if strictest is None and (len(names) != 1 or None in names):
        return {}
    terms = strictest or sources[0]
    assert terms is not None
    if terms.identifier != "other" and terms.commercial:
        return {"license": terms.identifier}
    return {"license": "other", "license_name": terms.name} | ({"license_link": terms.link} if terms.link else {})
