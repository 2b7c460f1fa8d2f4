"""From YAML values to frozen dataclasses, and the table of all keys."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any

import pytest
import yaml
from conftest import REPOSITORY, TINY
from hypothesis import given, settings
from hypothesis import strategies as st

from utils import config, plugins
from utils.config import schema
from utils.config.reader import Reader
from utils.config.schema import Choices, Named, as_dict, setting
from utils.errors import UserError


@dataclass(frozen=True)
class Hammer:
    weight: float = setting(1.5, "kilograms", above=0)


@dataclass(frozen=True)
class Saw:
    teeth: int = setting(40, "number of teeth", low=1)


TOOLS = Choices(table={"hammer": Hammer, "saw": Saw})


@dataclass(frozen=True)
class Shelf:
    tool: Named = setting(schema.REQUIRED, "the tool", choices=TOOLS, inline=True)
    height: float = setting(2.0, "metres", low=0, high=3)


@dataclass(frozen=True)
class Shop:
    shelf: Shelf = setting(Shelf, "the shelf")
    main: Named = setting(Named("saw", Saw()), "the first tool", choices=TOOLS)
    spare: Named | None = setting(None, "another tool", choices=TOOLS)
    row: tuple[Named, ...] = setting((), "tools side by side", choices=TOOLS)
    size: int | tuple[int, ...] = setting(3, "side, or [height, width]", low=1)
    limit: int | None = setting(None, "at most so many", low=1)
    prices: tuple[float, ...] = setting((1.0, 2.0), "prices", low=0, below=10)
    color: str = setting("red", "paint", options=("red", "blue"))
    open_: bool = setting(True, "whether it is open", key="open")
    count: int = setting(5, "customers", low=0)
    mass: float = setting(0.5, "tonnes", above=0, below=1)


def read(**raw: Any) -> Shop:
    """Read a shop whose shelf is given unless the test gives one."""
    shop: Shop = Reader(lambda key: "shop.yaml").section(Shop, {"shelf": {"saw": None}} | raw)
    return shop


def refused(**raw: Any) -> str:
    """Return the error, one line, with which reading fails."""
    with pytest.raises(UserError) as caught:
        read(**raw)
    assert "\n" not in str(caught.value) and str(caught.value).startswith("shop.yaml: ")
    return str(caught.value)


def test_what_is_left_out_has_its_default() -> None:
    """A missing key has the declared default; a missing required key is an error that names it."""
    shop = read()
    assert (shop.main, shop.spare, shop.row, shop.size, shop.limit) == (Named("saw", Saw(40)), None, (), 3, None)
    assert (shop.prices, shop.color, shop.open_, shop.count, shop.mass) == ((1.0, 2.0), "red", True, 5, 0.5)
    line = refused(shelf=None)
    assert "shelf" in line and "hammer, saw" in line


@given(
    st.one_of(st.integers(-5, 5), st.floats(-2, 2), st.booleans(), st.text(max_size=3), st.none(), st.lists(st.integers(0, 2)))
)
@settings(deadline=None, max_examples=150)
def test_a_scalar_is_taken_only_in_its_type_and_range(value: Any) -> None:
    """Integers, floats, strings and booleans are never converted into one another, and bounds are exact."""
    kind = type(value)
    legal = {
        "count": kind is int and value >= 0,
        "mass": kind in (int, float) and 0 < value < 1,
        "open": kind is bool,
        "color": value in ("red", "blue") and kind is str,
        "limit": value is None or (kind is int and value >= 1),
        "size": (kind is int and value >= 1) or (kind is list and all(v >= 1 for v in value)),
        "prices": kind is list and all(0 <= v < 10 for v in value),
    }
    for key, right in legal.items():
        if right:
            got = getattr(read(**{key: value}), "open_" if key == "open" else key)
            assert got == (tuple(value) if kind is list else value)
        else:
            assert f"{key}" in refused(**{key: value})


def test_numbers_become_the_declared_type() -> None:
    """An integer where a float is declared becomes one, so 1 and 1.0 are the same setting."""
    shop = read(shelf={"saw": None, "height": 3}, prices=[1, 2])
    assert type(shop.shelf.height) is float and [type(p) for p in shop.prices] == [float, float]


@pytest.mark.parametrize(("value", "bad"), [(0, True), (1, True), (5e-324, False), (0.9999999, False), (math.nan, True)])
def test_exclusive_bounds(value: float, bad: bool) -> None:
    """An exclusive bound is refused, and the nearest number inside is accepted."""
    if bad:
        assert "> 0 and < 1" in refused(mass=value)
    else:
        assert read(mass=value).mass == value


def test_inclusive_bounds() -> None:
    """An inclusive bound is accepted, and a slightly larger number is not."""
    assert read(shelf={"saw": None, "height": 3}).shelf.height == 3
    assert ">= 0 and <= 3" in refused(shelf={"saw": None, "height": 3.0000001})


def test_a_wrong_number_of_a_list_is_named_by_its_place() -> None:
    """The error for a list names the invalid element."""
    line = refused(prices=[1, 2, -3])
    assert "prices[2]" in line and "-3" in line
    assert "prices[1]" in refused(prices=[1, "2e-3"]) and "2.0e-3" in refused(prices=[1, "2e-3"])


def test_union_of_a_number_and_a_list() -> None:
    """A side may be one number or a list of numbers, each checked."""
    assert read(size=7).size == 7
    assert read(size=[7, 8]).size == (7, 8)
    assert "size[1]" in refused(size=[7, 0])
    assert "size" in refused(size="7")


@pytest.mark.parametrize("raw", ["hammer", {"hammer": None}, {"hammer": {}}, {"hammer": {"weight": 1.5}}])
def test_a_choice_by_name(raw: Any) -> None:
    """A choice may be a bare name, a name with null, or a name with its settings."""
    assert read(main=raw).main == read(spare=raw).spare == Named("hammer", Hammer(1.5))


@pytest.mark.parametrize(
    ("raw", "expected"),
    [
        ({"hamer": {}}, ["main.hamer", "did you mean hammer?"]),
        ("hamer", ["main", "'hamer'", "did you mean hammer?"]),
        ({"saw": {}, "hammer": {}}, ["main", "2 names", "saw, hammer"]),
        ({}, ["main", "name one of hammer, saw"]),
        (3, ["main", "3", "name one of hammer, saw"]),
        ({"saw": 3}, ["main.saw", "3", "section"]),
        ({"saw": {"tooth": 3}}, ["main.saw.tooth", "did you mean teeth?"]),
        ({"saw": {"teeth": 0}}, ["main.saw.teeth", "0", ">= 1"]),
    ],
)
def test_an_invalid_choice_is_refused(raw: Any, expected: list[str]) -> None:
    """Anything but exactly one known name with its own settings is refused with the legal names."""
    line = refused(main=raw)
    for part in expected:
        assert part in line


def test_lists_of_choices_keep_their_order_and_entries_can_be_disabled() -> None:
    """Several names keep the order of the file; `true` means the defaults, `false` and null leave one out."""
    row = read(row={"saw": True, "hammer": {"weight": 2}}).row
    assert row == (Named("saw", Saw(40)), Named("hammer", Hammer(2.0)))
    assert read(row={"hammer": {"weight": 2}, "saw": False}).row == (Named("hammer", Hammer(2.0)),)
    assert read(row={"saw": None}).row == read(row=None).row == read(row=[]).row == ()
    assert "row" in refused(row=["saw"])


def test_an_inline_choice_stands_among_its_sections_keys() -> None:
    """The only key of a section that is not one of its settings is the choice, in any position."""
    for raw in ({"hammer": {"weight": 2}, "height": 1}, {"height": 1, "hammer": {"weight": 2}}):
        assert read(shelf=raw).shelf == Shelf(Named("hammer", Hammer(2.0)), 1.0)
    line = refused(shelf={"saw": {}, "heigth": 1})
    assert "shelf.heigth" in line and "did you mean height?" in line
    assert "2 names" in refused(shelf={"saw": {}, "hammer": {}})
    assert "hammer, saw" in refused(shelf={"height": 1})


@given(
    st.fixed_dictionaries(
        {
            "shelf": st.fixed_dictionaries(
                {"saw": st.fixed_dictionaries({"teeth": st.integers(1, 9)})}, optional={"height": st.floats(0, 3)}
            )
        },
        optional={
            "main": st.sampled_from([{"saw": {}}, {"hammer": {"weight": 3.5}}]),
            "spare": st.sampled_from([None, "hammer"]),
            "row": st.sampled_from([None, {"saw": True}, {"hammer": None}, {"saw": {"teeth": 2}, "hammer": {}}]),
            "size": st.one_of(st.integers(1, 9), st.lists(st.integers(1, 9), min_size=1)),
            "limit": st.one_of(st.none(), st.integers(1, 2**40)),
            "prices": st.lists(st.floats(0, 9)),
            "open": st.booleans(),
        },
    )
)
@settings(deadline=None, max_examples=60)
def test_written_and_read_again_is_the_same(raw: dict[str, Any]) -> None:
    """Settings written as YAML and read again are equal to what was written."""
    shop = read(**raw)
    assert read(**yaml.safe_load(yaml.safe_dump(as_dict(shop), sort_keys=False))) == shop


def keys_of(tree: dict[str, Any], path: str = "") -> list[str]:
    """Return every dotted key of a resolved configuration that has a value."""
    out = []
    for key, value in tree.items():
        out += keys_of(value, f"{path}{key}.") if isinstance(value, dict) and value else [path + key]
    return out


def test_the_table_lists_every_key() -> None:
    """Every key of a resolved configuration, and every setting of every plug-in, has a row with a meaning."""
    rows = {key: (kind, default, text) for key, kind, default, text in schema.describe(config.Config)}
    assert all(kind and text for kind, default, text in rows.values()), [k for k, r in rows.items() if not (r[0] and r[2])]
    last_parts = {key.rpartition(".")[2] for key in rows}
    resolved = yaml.safe_load(config.to_yaml(config.load(REPOSITORY / "config" / "demo.yaml")))
    for key in keys_of(resolved):
        holder = {"optimizer", "lr_scheduler", "primary", "remaining", "pre"} & set(key.split("."))
        assert key in rows or (holder and (key.rpartition(".")[2] in last_parts or key.endswith("to_tensor"))), key
    places = {
        "data.attacks": "backdoor",
        "data.datasets": "dataset",
        "defenses": "defense",
        "model.networks": "network",
        "data.transforms": None,
    }
    for package, section in places.items():
        for name in plugins.names(package):
            place = section or plugins.load(package, name).PLACES[0]
            for field in dataclasses.fields(plugins.settings(package, name)):
                assert f"{place}.{name}.{field.name}" in rows
    for key in ("global.epoch_first", "optimizer.Adam.lr", "optimizer.SGD.momentum", "lr_scheduler.multi_step.milestones"):
        assert key in rows
    assert rows["num_epochs"][:2] == ("int", "120") and rows["backdoor.poison_mode"][:2] == ("bernoulli / exact", '"bernoulli"')
    assert not [key for key in rows if "global_" in key]


def test_a_resolved_tiny_file_shows_every_choice() -> None:
    """The written form has the names of the YAML: `global`, and the attack among the keys of `backdoor`."""
    shop = as_dict(read(shelf={"hammer": None}, row={"saw": True}))
    assert shop["shelf"] == {"hammer": {"weight": 1.5}, "height": 2.0}
    assert shop["row"] == {"saw": {"teeth": 40}} and "open" in shop and "open_" not in shop
    assert "global" in TINY


@given(
    st.sampled_from(["", "+", "-"]),
    st.sampled_from(["2", "2.5", "10", ".5", "3."]),
    st.sampled_from(["", "+", "-"]),
    st.integers(0, 12),
)
@settings(deadline=None, max_examples=80)
def test_the_proposed_number_is_the_one_that_was_meant(sign: str, digits: str, exponent: str, power: int) -> None:
    """The suggested form of `2e-3` is read by YAML as the intended number."""
    text = f"{sign}{digits}e{exponent}{power}"
    proposed = yaml.safe_load(schema.with_point(text))
    assert isinstance(proposed, float) and proposed == float(text)


def test_a_schema_that_cannot_be_read_is_refused_in_one_line() -> None:
    """A section that is no dataclass, a field of a type that no YAML value has, and a default outside of the field's
    own bounds are errors that name file, section and field, before any value is read."""

    class Plain:
        side = 3

    def section(hint: Any, default: Any = None, **declared: Any) -> type:
        return dataclasses.make_dataclass("Settings", [("side", hint, setting(default, "help", **declared))], frozen=True)

    wrong = [(Plain, "dataclass")]
    wrong += [(section(hint), "type") for hint in (list[int], dict[str, int], bytes, tuple[int, int], int | bytes, complex)]
    wrong += [(section(int, 0, low=1), "0: must be >= 1"), (section(tuple[float, ...], (0.5, 2.0), high=1), "must be <= 1")]
    wrong += [(section(float, math.nan), "nan: must be finite")]
    for kind, expected in wrong:
        with pytest.raises(UserError) as caught:
            schema.keys_of(kind)
        line = str(caught.value)
        assert f"{kind.__module__}.py: {kind.__name__}: " in line and expected in line and "\n" not in line
        assert kind is Plain or ": side: " in line
    for hint in (int, float | None, tuple[str, ...], tuple[Named, ...] | None, int | tuple[int, ...], schema.MAPPING, Hammer):
        assert [*schema.keys_of(section(hint))] == ["side"]
