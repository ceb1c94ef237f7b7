import pytest
import timm
from hub import card_rules

from hf_bcd.card.licences import KNOWN, Licence, from_identifier, licence_of, student_licence


@pytest.mark.parametrize(
    ("repo_id", "name", "commercial"),
    [
        ("nvidia/segformer-b4-finetuned-ade-512-512", "NVIDIA", False),
        ("nvidia/mit-b0", "NVIDIA", False),
        ("facebook/mask2former-swin-large-ade-semantic", "CC BY-NC 4.0", False),
        ("openmmlab/upernet-convnext-small", "MIT", True),
        ("apple/deeplabv3-mobilevit-small", "Apple Sample Code License", True),
        ("timm/resnet18.a1_in1k", "apache-2.0", True),
        ("timm/convnextv2_atto.fcmae_ft_in1k", "cc-by-nc-4.0", False),
        ("timm/fastvit_t8.apple_in1k", "fastvit-license", True),
    ],
)
def test_known_terms(repo_id: str, name: str, commercial: bool) -> None:
    terms = licence_of(repo_id)
    assert terms is not None and terms.name.startswith(name) and terms.commercial is commercial


def test_terms_come_from_the_card_of_other_repositories(monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import ModelCard

    metadata = "license: other\nlicense_name: my-research-only-terms\nlicense_link: https://example.org/terms"
    monkeypatch.setattr(ModelCard, "load", lambda name, **_: ModelCard(f"---\n{metadata}\n---\n"))
    assert licence_of("me/teacher") == Licence(
        "other", "my-research-only-terms", "https://example.org/terms", commercial=False
    )
    monkeypatch.setattr(ModelCard, "load", lambda name, **_: ModelCard("---\ntags: [a]\n---\n"))
    assert licence_of("me/teacher") is None
    monkeypatch.setattr(ModelCard, "load", lambda name, **_: ModelCard("---\n: [\n---\n"))
    assert licence_of("me/teacher") is None


@pytest.mark.parametrize("name", ["me/teacher", "timm/no_such_backbone.tag", "timm/resnet18.no_tag"])
def test_terms_of_what_cannot_be_read_are_unknown(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert licence_of(name) is None


@pytest.mark.parametrize(
    ("identifier", "commercial"),
    [
        ("cc-by-nc-sa-4.0", False),
        ("mit", True),
        ("ncsa", True),
        ("apple-amlr", False),
        ("apache-2.0", True),
        ("non-commercial", False),
    ],
)
def test_identifiers_that_forbid_commercial_use(identifier: str, commercial: bool) -> None:
    assert from_identifier(identifier).commercial is commercial


MIT, APACHE = from_identifier("mit"), from_identifier("apache-2.0")
FORBIDDEN = from_identifier("cc-by-nc-4.0", "CC BY-NC 4.0", "https://example.org")


@pytest.mark.parametrize(
    ("sources", "expected"),
    [
        ([], {}),
        ([MIT, MIT], {"license": "mit"}),
        ([MIT, APACHE], {}),
        ([MIT, None], {}),
        ([None], {}),
        (
            [MIT, FORBIDDEN, None],
            {"license": "other", "license_name": "CC BY-NC 4.0", "license_link": "https://example.org"},
        ),
        ([from_identifier("cvnets-license")], {"license": "other", "license_name": "cvnets-license"}),
    ],
)
def test_what_follows_for_the_student(sources: list, expected: dict) -> None:
    assert student_licence(sources) == expected


def test_every_suggestion_is_one_that_the_hub_takes() -> None:
    names = [f"{beginning}x" for beginnings in KNOWN for beginning in beginnings]
    stated = {timm.get_pretrained_cfg(name).license for name in timm.list_pretrained()} - {None, "unknown"}
    terms = [*map(licence_of, names), *map(from_identifier, stated)]
    suggested = {student_licence([found])["license"] for found in terms}
    assert {"mit", "apache-2.0", "other"} <= suggested <= card_rules.LICENSES
