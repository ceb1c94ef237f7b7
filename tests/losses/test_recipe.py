"""From a recipe's `losses` section to checked options, and from these to a criterion."""

import copy
import inspect
import math
import pickle
import re
from typing import Any

import pytest
import torch
from loss_references import pair_of

from hf_bcd.losses import LOSSES, BCDLoss, CrossKDLoss, build_criterion
from hf_bcd.losses.recipe import ALWAYS_OFFERED, check_needs, options_of, read_losses
from hf_bcd.outputs import FeatureSpec
from hf_bcd.utils.messages import UserError, unknown_key_message


SPECS = {"stride_4": FeatureSpec(4, 4), "stride_8": FeatureSpec(6, 8)}
SMALL: dict[str, Any] = {"channels": 8, "reduced_channels": 4}


def weights_of(losses: dict[str, Any]) -> dict[str, float]:
    return build_criterion(losses, SPECS, SPECS, num_labels=3).weights


@pytest.mark.parametrize(
    ("losses", "message"),
    [
        (["bcd"], "losses is \\['bcd'\\]; it must map"),
        ({"bdc": {}}, "unknown loss 'bdc'. Did you mean 'bcd'"),
        ({"bcd": 3}, "options of loss 'bcd' are 3; they must be a mapping"),
        ({"bcd": {"raduis": 3}}, "unknown option of loss 'bcd' 'raduis'. Did you mean 'radius'.*weight"),
        *(({"bcd": {key: 0}}, f"unknown option of loss 'bcd' '{key}'") for key in ("pair", "seed", "ignore_index")),
        ({"bcd": {"weight": {"boundry": 1}}}, "unknown term of loss 'bcd' 'boundry'. Did you mean 'boundary'"),
        ({"bcd": {"weight": -1}}, "weight of bcd/boundary is -1"),
        ({"bcd": {"weight": {"context": math.nan}}}, "weight of bcd/context is nan"),
        *(({"bcd": {"weight": value}}, f"is {value!r}") for value in (math.inf, "3", True)),
        ({"kd": {"weight": "auto"}}, "weight of loss 'kd' is 'auto', which only bcd can have"),
        ({"bcd": {"weight": 0}, "kd": {"weight": 0}}, "no term has a weight above 0"),
        ({"bcd": {"decay": "no"}}, "decay of loss 'bcd' is 'no'; it must be true or false"),
        ({"kd": {"temperature": "hot"}}, "temperature of loss 'kd' is 'hot'; it must be a number\\."),
        ({"fgd": {"background": True}}, "background of loss 'fgd' is True; it must be a whole number or null\\."),
        ({"pkd": {"levels": 8}}, "levels of loss 'pkd' is 8; it must be a list of names or null\\."),
        ({"bcd": {"mode": "literal"}}, "'literal'.*'paper'"),
        ({"bcd": {"teacher_head": "pcx"}}, "'pcx'.*calibrated"),
        ({"bcd": {"mode": "paper", "teacher_head": "logits"}}, "no literal form"),
        ({"bcd": {"radius": 1}}, "radius is 1"),
        ({"bcd": {"channels": -8}}, "channels is -8"),
        *(({name: {"width": 6}}, "width is 6") for name in ("bglsseg", "bpkd", "slimseg")),
        *(({name: {"temperature": 0}}, "temperature is 0") for name in ("bglsseg", "bpkd", "c2vkd", "cirkd", "dsd", "fgd", "slimseg")),
        *(({name: {"level": "stride_2"}}, "level is 'stride_2'") for name in ("bglsseg", "c2vkd", "cirkd", "skd", "sstkd")),
        ({"cirkd": {"memory_mib": math.nan}}, "memory_mib of loss 'cirkd' is nan"),
        ({"cirkd": {"memory_mib": 1e-5}}, "memory_mib is 1e-05; 1 classes of 1 channels need 4.2e-05 MiB"),
        ({"cirkd": {"stride": 0}}, "stride is 0"),
        ({"crosskd": {"beta": 0.5}}, "beta is 0.5; it must be 0 or >= 1"),
        ({"cwd": {"level": "stride_4"}}, "level is 'stride_4', but logits have none"),
        ({"bcd": {"radius": 17}}, "radius is 17"),
        *(({"bcd": {"temperature": value}}, f"temperature is {value}; it must be a number > 0") for value in (0, -1.0, 1e-300)),
        ({"cwd": {"on": "nothing"}}, "on is 'nothing'; choose one of logits, features\\."),
        ({"dsd": {"levels": ["stride_4"]}}, "levels are stride_4; residual attention needs two or more"),
        ({"fam": {"frequencies": 1}}, "frequencies is 1"),
        *(({"fam": {"cutoff": value}}, f"cutoff {value}") for value in (0.0, 1.0)),
        ({"fgd": {"background": -1}}, "background is -1"),
        ({"ifd": {"projectors": 0}}, "projectors is 0"),
        ({"ifvd": {"discriminator_channels": -1}}, "discriminator_channels is -1"),
        ({"mgd": {"masked": 1}}, "masked is 1"),
        ({"skd": {"nodes": 0}}, "nodes is 0"),
        *(({"sstkd": {key: value}}, f"{key} is {value}") for key, value in {"pyramid_levels": 0, "directions": 0, "intensity_levels": 1}.items()),
        *(({"tat": {key: 0}}, f"{key} is 0") for key in ("patches", "group", "anchors")),
        ({"sckd": {"host": {"kdd": {}}}}, "unknown loss 'kdd'. Did you mean 'kd'"),
        ({"sckd": {"host": {"kd": {"temprature": 1}}}}, "unknown option of loss 'kd' 'temprature'"),
        ({"sckd": {"host": {"kd": {"weight": -1}}}}, "weight of kd/kd is -1"),
        ({"sckd": {"host": "kd"}}, "host of loss 'sckd' is 'kd'; it must map losses to options"),
        ({"sckd": {"host": {}}}, "host of loss 'sckd' is {}"),
        ({"sckd": {"host": {"sckd": {}}}}, "sckd cannot host 'sckd'"),
        ({"sckd": {"host": {"bcd": {"weight": "auto"}}}}, "`weight: auto` cannot measure"),
        ({"sckd": {"host": {"kd": {}, "bcd": {}}}}, "decay is {'kd': False, 'bcd': True}; give all the same"),
        *(({"sckd": {"threshold": value}}, f"threshold is {value}") for value in (1, -1.5)),
        ({"sckd": {"weight": {"kd": 1}}}, "unknown term of loss 'sckd' 'kd'. Known: kd/kd"),
    ],
)  # fmt: skip
def test_a_bad_recipe_is_explained_when_it_is_read(losses, message):
    with pytest.raises(UserError, match=message):
        read_losses(losses)


WRONG: dict[str, list[Any]] = {
    "a number": [None, "hot", "", [], [1], {}, {"x": 5}, True, math.nan, math.inf, -math.inf, 10**400, b"x"],
    "a whole number": [None, "hot", [], [1], {"x": 5}, True, 0.5, math.nan, math.inf, -1, 10**9, 10**400],
    "a name": [0, 0.5, [], ["x"], {}, True, math.nan, "", "hot"],
    "a list of names": ["hot", "", b"x", [], [1], ["stride_4", None], {}, 0, True, math.nan],
    "true or false": ["yes", 0, 1, [], {}, math.nan],
    "losses": [None, "hot", [], ["kd"], {}, 3, True, {"x": 5}],
}


def kind_of(name: str, option: str) -> str:
    cls = LOSSES[name]
    if option in cls.nested:
        return "losses"
    if option in ("weight", "decay", "optional"):
        return {"weight": "a number"}.get(option, "true or false")
    annotation = str(inspect.signature(cls).parameters[option].annotation)
    kinds = {"float": "a number", "int": "a whole number", "Sequence": "a list of names"}
    return next((kind for word, kind in kinds.items() if word in annotation), "a name")


@pytest.mark.parametrize("name", sorted(LOSSES))
def test_no_wrong_value_passes_any_option_and_the_message_names_both(name):
    tried = 0
    for option in [*options_of(LOSSES[name]), "weight", "decay", "optional"]:
        for value in WRONG[kind_of(name, option)]:
            if (option == "weight" and value == {}) or (value is None and option == "background"):
                continue  # the defaults
            with pytest.raises(UserError, match=f"(?=.*{name})(?=.*{re.escape(option)}|.*unknown)") as error:
                read_losses({name: {option: value}})
            assert "\n" not in str(error.value), (option, value)
            tried += 1
    assert tried >= 18


@pytest.mark.parametrize("value", [[], [1], 3, 0, "hot", True, math.nan])
def test_options_are_a_mapping(value):
    with pytest.raises(UserError, match=re.escape(f"options of loss 'kd' are {value!r}; they must be a mapping")):
        read_losses({"kd": value})


def test_what_only_the_models_can_tell_is_explained_when_a_criterion_is_built():
    for losses, message in (
        ({"fgd": {"background": 300}}, "background is 300, but the student has 3 classes"),
        ({"kd": {}, "cwd": {"on": "features", "level": "stride_32"}}, "level is 'stride_32'; student"),
        ({"cirkd": {"memory_mib": 1e-4}}, "memory_mib is 0.0001; 3 classes of 6 channels need 0.000755 MiB"),
        ({"sckd": {"host": {"crosskd": {}}}}, "loss 'sckd' needs head"),
        ({"crosskd": {}}, r"loss 'crosskd' needs head, but .* only offer .*another loss: .*\bcwd\b"),
    ):
        read_losses(losses)
        with pytest.raises(UserError, match=message):
            build_criterion(losses, SPECS, SPECS, num_labels=3)
    for name in ("at", "bglsseg", "c2vkd", "cirkd", "cwt", "fam", "fgd", "fitnet", "ifd", "mgd", "pkd", "skd", "tat"):
        if name != "bglsseg":
            with pytest.raises(UserError, match="share no level"):
                build_criterion({name: {}}, SPECS, {"stride_32": FeatureSpec(4, 32)}, num_labels=3)
    with pytest.raises(UserError, match="loss 'sckd' needs task_loss.*torch_compile"):
        build_criterion({"sckd": {}}, SPECS, SPECS, num_labels=3, offers=ALWAYS_OFFERED - {"task_loss"})


def test_losses_that_serve_are_named_with_the_option_that_makes_them_so():
    detectors = frozenset({"features", "labels", "task_loss", "classes", "tower"})
    with pytest.raises(
        UserError, match=r"another loss: at, bcd, crosskd \(on: tower\), cwd \(on: features\), cwt, fam"
    ):
        check_needs({"kd": {}}, detectors)
    with pytest.raises(UserError, match=r"another loss: (?!.*crosskd).*cwd \(on: features\)"):
        check_needs({"kd": {}}, detectors - {"tower"})


def test_an_optional_loss_is_left_out_where_nothing_serves_it():
    losses = {"cwd": {"optional": True}, "bcd": {}}
    offers = {"with": ALWAYS_OFFERED, "without": ALWAYS_OFFERED - {"logits"}}
    built = {key: build_criterion(losses, SPECS, SPECS, num_labels=3, offers=x) for key, x in offers.items()}
    assert {key: list(criterion.losses) for key, criterion in built.items()} == {
        "with": ["cwd", "bcd"],
        "without": ["bcd"],
    }
    with pytest.raises(UserError, match="loss 'cwd' needs logits"):
        check_needs({"cwd": {}, "bcd": {}}, offers["without"])
    with pytest.raises(UserError, match=r"losses cwd are optional, .* none of them.*\bbcd\b"):
        build_criterion({"cwd": {"optional": True}}, SPECS, SPECS, num_labels=3, offers=offers["without"])


def test_no_hint_where_nothing_is_near():
    assert unknown_key_message("loss", "zzz", ["kd", "bcd"]) == "unknown loss 'zzz'. Known: bcd, kd."


def test_read_losses_travel_as_they_are():
    torch.manual_seed(0)
    expected = torch.rand(1)
    torch.manual_seed(0)
    parsed = read_losses({"bcd": SMALL | {"weight": 2}, "sckd": {"host": {"kd": {"weight": 5}}}})
    assert torch.equal(torch.rand(1), expected)  # reading draws no random numbers
    assert read_losses(parsed) == parsed == copy.deepcopy(parsed) == pickle.loads(pickle.dumps(parsed))
    assert parsed["bcd"].options == SMALL and parsed["sckd"].options["host"]["kd"].weights == {"kd": 5}
    assert weights_of(parsed) == {"bcd/boundary": 2, "bcd/context": 2, "sckd/kd/kd": 5}


def test_facts_follow_the_options():
    assert not read_losses({"kd": None})["kd"].decays and read_losses({"bcd": None})["bcd"].decays
    assert read_losses({"bcd": {"weight": "auto"}})["bcd"].measured
    assert read_losses({"cwd": {"on": "features"}})["cwd"].needs == {"features"}
    hosts = {"crosskd": {}, "cwd": {"on": "features"}}
    assert read_losses({"sckd": {}})["sckd"].needs == {"logits", "task_loss"}
    assert read_losses({"sckd": {"host": hosts}})["sckd"].needs == {"features", "head", "task_loss"}
    assert "background" not in read_losses({"fgd": {}})["fgd"].weights
    assert "background" in read_losses({"fgd": {"background": 300}})["fgd"].weights
    assert read_losses({"skd": {"discriminator_channels": 0}})["skd"].weights.keys() == {"pixel", "pair"}


def test_default_weights_follow_the_mode():
    assert weights_of({"bcd": None}) == {"bcd/boundary": 3, "bcd/context": 1}
    assert weights_of({"bcd": {"mode": "paper"}}) == {"bcd/boundary": 10, "bcd/context": 50}
    assert weights_of({"bcd": {"weight": {"context": 4}}}) == {"bcd/boundary": 3, "bcd/context": 4}
    assert weights_of({"bcd": {"weight": 0.5}}) == {"bcd/boundary": 0.5, "bcd/context": 0.5}


def test_default_weights_of_cwd_follow_what_it_compares():
    assert weights_of({"cwd": {}}) == {"cwd/cwd": 3} and weights_of({"cwd": {"on": "features"}}) == {"cwd/cwd": 50}


def test_a_single_weight_is_that_of_the_methods_own_terms():
    assert weights_of({"ifvd": {"weight": 20}}) == {"ifvd/variation": 20, "ifvd/kd": 10, "ifvd/adversarial": 0.001}
    every = {name: cls for name, cls in LOSSES.items() if cls.borrowed}
    assert every and all(cls.borrowed < set(cls.weights) for cls in every.values())


def test_options_levels_and_seed_reach_the_loss():
    loss = build_criterion({"bcd": SMALL | {"radius": 5}}, SPECS, SPECS, num_labels=3, seed=3).losses["bcd"]
    assert isinstance(loss, BCDLoss) and loss.radius == 5
    same_seed = BCDLoss(pair_of(SPECS, seed=3), **SMALL)
    assert torch.equal(loss.teacher_head.readout.weight, same_seed.teacher_head.readout.weight)
    for head_levels, expected in ((("stride_8",), ["stride_8"]), (None, ["stride_4", "stride_8"])):
        options = {"num_labels": 3, "offers": frozenset({"features", "head"}), "head_levels": head_levels}
        loss = build_criterion({"crosskd": {}}, SPECS, SPECS, **options).losses["crosskd"]
        assert isinstance(loss, CrossKDLoss) and [pair.level for pair in loss.pairs] == expected
