"""Spaces, genes and their costs against the published integers (DetNAS, arXiv 1903.10979)."""

from __future__ import annotations

import itertools
import tomllib
from dataclasses import replace

import numpy as np
import pytest
import tomli_w

from detkit.errors import ConfigError
from detkit.models.search_space import (
    ARCHITECTURES,
    SPACES,
    SearchSpace,
    architecture_name,
    parse_architecture,
    parse_supernet,
)
from detkit.nas.cost import CostTable, cost_table

SMALL, LARGE, WIDE, TINY = (SPACES[name] for name in ("small", "large", "wide", "tiny"))

# Per position kind, from stage 2 on: first block, then the others; (MACs, parameters) of each op.
BLOCKS = {
    "small": [
        ([13_396_992, 15_805_440, 19_418_112, 13_146_112], [3_024, 3_792, 4_944, 4_640]),
        ([7_325_696, 8_931_328, 11_339_776, 12_343_296], [2_528, 3_040, 3_808, 4_320]),
        ([26_304_768, 28_111_104, 30_820_608, 20_296_192], [18_960, 21_264, 24_720, 27_104]),
        ([10_599_680, 11_603_200, 13_108_480, 16_746_240], [14_000, 15_280, 17_200, 22_320]),
        ([30_670_080, 31_673_600, 33_178_880, 21_199_360], [81_280, 86_400, 94_080, 110_720]),
        ([10_317_440, 10_819_200, 11_571_840, 15_899_520], [53_600, 56_160, 60_000, 83_040]),
        ([30_387_840, 30_889_600, 31_642_240, 20_634_880], [316_160, 326_400, 341_760, 426_240]),
        ([10_176_320, 10_427_200, 10_803_520, 15_476_160], [209_600, 214_720, 222_400, 319_680]),
    ],
    "large": [
        ([46_061_568, 50_878_464, 58_103_808, 34_320_384], [8_256, 9_792, 12_096, 11_712]),
        ([15_805_440, 18_213_888, 21_826_560, 25_740_288], [5_328, 6_096, 7_248, 8_784]),
        ([58_423_680, 61_133_184, 65_197_440, 44_142_336], [41_112, 44_568, 49_752, 58_128]),
        ([23_425_920, 24_931_200, 27_189_120, 36_408_960], [30_600, 32_520, 35_400, 47_880]),
        ([68_584_320, 70_089_600, 72_347_520, 46_851_840], [179_520, 187_200, 198_720, 242_880]),
        ([23_002_560, 23_755_200, 24_884_160, 35_138_880], [118_800, 122_640, 128_400, 182_160]),
        ([68_160_960, 68_913_600, 70_042_560, 46_005_120], [704_640, 720_000, 743_040, 946_560]),
        ([22_790_880, 23_167_200, 23_731_680, 34_503_840], [468_000, 475_680, 487_200, 709_920]),
    ],
}
STEMS = {"small": (5_419_008, 480), "large": (16_257_024, 1_440)}

# Body MACs, full MACs, body parameters, full parameters.
NETS = {
    "detnas-300m": (288_082_368, 321_219_008, 1_849_680, 3_533_112),
    "detnas-300m-1019": (299_936_448, 333_073_088, 1_857_360, 3_540_792),
    "detnas-300m-retinanet": (291_205_824, 324_342_464, 2_041_888, 3_725_320),
    "detnas-300m-voc": (316_387_904, 349_524_544, 1_967_696, 3_651_128),
    "detnas-300m-voc-retinanet": (327_489_344, 360_625_984, 1_796_048, 3_479_480),
    "detnas-300m-spos": (289_782_080, 322_918_720, 1_877_072, 3_560_504),
    "detnas-300m-mmrazor": (292_786_368, 325_923_008, 1_666_720, 3_350_152),
    "detnas-1.3g": (1_269_181_536, 1_318_374_496, 8_415_216, 10_426_328),
    "detnas-3.8g": (3_937_832_864, 4_085_874_080, 26_724_428, 31_444_596),
}
UNIFORM = {
    ("small", 0): (262_705_856, 295_842_496, 1_473_488, 3_156_920),
    ("small", 1): (280_518_336, 313_654_976, 1_530_576, 3_214_008),
    ("small", 2): (307_237_056, 340_373_696, 1_616_208, 3_299_640),
    ("small", 3): (325_689_280, 358_825_920, 2_189_424, 3_872_856),
    ("large", 0): (1_036_681_632, 1_085_874_592, 6_244_464, 8_255_576),
    ("large", 3): (1_391_231_520, 1_440_424_480, 9_359_208, 11_370_320),
}


def costs(table: CostTable, genes: tuple[int, ...]) -> tuple[int, int, int, int]:
    body, full = table.body(genes), table.full(genes)
    return body.macs, full.macs, body.params, full.params


@pytest.mark.parametrize("name", BLOCKS)
def test_cost_of_every_block(name: str) -> None:
    table = cost_table(SPACES[name])
    assert (table.stem.macs, table.stem.params) == STEMS[name]
    for position, found in zip(SPACES[name].positions(), table.blocks, strict=True):
        macs, params = BLOCKS[name][2 * (position.stage - 2) + (position.stride == 1)]
        assert [cost.macs for cost in found] == macs
        assert [cost.params for cost in found] == params


@pytest.mark.parametrize("name", NETS)
def test_cost_of_published_networks(name: str) -> None:
    found = ARCHITECTURES[name]
    space = SPACES[found.space]
    assert costs(cost_table(space), space.parse(found.genes)) == NETS[name]


@pytest.mark.parametrize(("name", "gene"), UNIFORM)
def test_cost_of_networks_of_one_block(name: str, gene: int) -> None:
    space = SPACES[name]
    assert costs(cost_table(space), (gene,) * len(space)) == UNIFORM[name, gene]


def test_ranges_supernets_and_the_first_release_of_3_8g() -> None:
    small, large = cost_table(SMALL), cost_table(LARGE)
    assert small.body_macs_range() == (237_222_720, 365_472_576)
    assert large.body_macs_range() == (966_770_784, 1_485_603_168)
    assert (small.supernet_params(), large.supernet_params()) == (6_808_256, 28_642_008)
    assert small.supernet_params() + small.tail.params == 8_491_688
    assert large.supernet_params() + large.tail.params == 30_653_120
    tails = [cost_table(space).tail.macs for space in (SMALL, LARGE, WIDE)]
    assert tails == [33_136_640, 49_192_960, 148_041_216]
    first = replace(WIDE, last=1024)
    genes = first.parse(ARCHITECTURES["detnas-3.8g"].genes)
    full = cost_table(first).full(genes)
    assert (full.macs, full.params) == (4_025_560_992, 29_521_972)
    assert (SMALL.size, LARGE.size) == (4**20, 4**40)


@pytest.mark.parametrize(
    ("name", "mean", "deviation", "quantiles"),
    [
        ("small", 294.0, 11.8, (266, 274, 294, 313, 321)),
        ("large", 1170.0, 33.9, (1092, 1114, 1170, 1226, 1249)),
    ],
)
def test_distribution_of_uniform_genes(
    name: str, mean: float, deviation: float, quantiles: tuple[int, ...]
) -> None:
    """Millions of body MACs: moments exactly, quantiles and shares from 40,000 networks."""
    table = cost_table(SPACES[name])
    macs = np.array([[cost.macs for cost in costs] for costs in table.blocks]) / 1e6
    assert round(table.stem.macs / 1e6 + float(macs.mean(1).sum()), 1) == mean
    assert round(float(macs.var(1).sum()) ** 0.5, 1) == deviation
    genes = np.random.default_rng(0).integers(0, 4, (40_000, len(macs)))
    drawn = table.stem.macs / 1e6 + macs[np.arange(len(macs)), genes].sum(1)
    found = np.quantile(drawn, (0.01, 0.05, 0.5, 0.95, 0.99))
    assert found == pytest.approx(quantiles, abs=1.5)
    if name == "small":
        full = drawn + table.tail.macs / 1e6
        shares = [(drawn <= 300).mean(), (full <= 300).mean(), (full <= 330).mean()]
        assert shares == pytest.approx([0.688, 0.012, 0.589], abs=0.01)
    else:
        assert (drawn <= 1300).mean() == pytest.approx(0.9999, abs=3e-4)


def test_macs_scale_with_the_image() -> None:
    genes = SMALL.parse(ARCHITECTURES["detnas-300m"].genes)
    at_224 = cost_table(SMALL).body(genes).macs
    whole = cost_table(SMALL, 800, 1344).body(genes)
    assert whole.macs * 49 == at_224 * 25 * 42
    assert whole.params == 1_849_680


def test_genes_read_back() -> None:
    genes = SMALL.parse("2120-2112-33130031-3132")
    assert genes == (2, 1, 2, 0, 2, 1, 1, 2, 3, 3, 1, 3, 0, 0, 3, 1, 3, 1, 3, 2)
    assert SMALL.parse("21202112331300313132") == genes
    assert SMALL.text(genes) == "2120-2112-33130031-3132"
    assert TINY.text(TINY.parse("0123012301")) == "01-23-0123-01"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("2120-2112-33130031-313", "must have 4-4-8-4 digits in the stages of the small space"),
        ("212-02112-33130031-3132", "must have 4-4-8-4 digits"),
        ("2120211233130031313", r"must be 20 numbers in 0..3 for the small space, got 19"),
        ("21202112331300313134", r"must be 20 numbers in 0..3"),
        ("2120211233130031313x", "must be digits with dashes between stages"),
        ("²1202112331300313132", "must be digits"),
        ("", "must be digits"),
    ],
)
def test_genes_of_another_shape_are_refused(text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        SMALL.parse(text)


def test_architecture_names_hold_the_convention() -> None:
    space, genes = parse_architecture("detnas:tiny:0123012301")
    assert (space, genes) == (TINY, (0, 1, 2, 3, 0, 1, 2, 3, 0, 1))
    space, _ = parse_architecture("detnas:tiny:01-23-0123-01:shuffle1")
    assert space == replace(TINY, shuffle=1)
    name = architecture_name(space, genes)
    assert name == "detnas:tiny:01-23-0123-01:shuffle1"
    assert parse_architecture(name) == (space, genes)
    with pytest.raises(ConfigError, match="space: must be one of small, large"):
        architecture_name(replace(TINY, stem=12), genes)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("detnas:tiny", "must read detnas:<space>:<genes>"),
        ("detnas:tinny:0123012301", "got 'tinny'; did you mean 'tiny'"),
        ("detnas:tiny:0123012301:shuffle3", "must end with one of shuffle1, shuffle2"),
        ("detnas:tiny:0123012301:shuffle1:shuffle1", "must end with one of"),
        ("detnas:tiny:0123", "must be 10 numbers"),
    ],
)
def test_wrong_architecture_names(name: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        parse_architecture(name)


def test_supernet_names() -> None:
    assert parse_supernet("detnas-supernet20") == SMALL
    assert parse_supernet("detnas-supernet40:shuffle1") == replace(LARGE, shuffle=1)
    assert parse_supernet("resnet50") is None
    with pytest.raises(ConfigError, match="did you mean 'shuffle1'"):
        parse_supernet("detnas-supernet20:shufle1")


def test_a_space_of_ones_own_from_toml() -> None:
    text = """
    name = "mine"
    blocks = [1, 2]
    stem = 8
    channels = [16, 32]
    last = 64
    ops = ["shuffle3", "xception"]
    shuffle = 1
    """
    space = SearchSpace.from_plain(tomllib.loads(text))
    assert (len(space), space.size) == (3, 8)
    assert [(p.stage, p.index, p.cin, p.cout, p.stride) for p in space.positions()] == [
        (2, 0, 8, 16, 2),
        (3, 0, 16, 32, 2),
        (3, 1, 32, 32, 1),
    ]
    assert SearchSpace.from_plain(tomllib.loads(tomli_w.dumps(space.to_plain()))) == space
    table = cost_table(space)
    every = [table.body(genes).macs for genes in itertools.product(range(2), repeat=3)]
    assert (min(every), max(every)) == table.body_macs_range()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"blocks": [1]}, "channels must be 1 numbers"),
        ({"blocks": [1, 0]}, "blocks must be positive"),
        ({"blocks": [1, True]}, "blocks must be a list of int"),
        ({"stem": 0}, "stem must be positive"),
        ({"stem": "8"}, "stem must be int, got '8'"),
        ({"channels": [16, 16]}, "channels must be growing from the stem's 8"),
        ({"channels": [8, 16]}, "channels must be growing"),
        ({"channels": [16, 33]}, "channels must be even"),
        ({"ops": []}, "ops must be at least one name"),
        ({"ops": ["shuffle3", "shufle5"]}, "got 'shufle5'; did you mean 'shuffle5'"),
        ({"ops": ["xception", "xception"]}, "ops must be named once each"),
        ({"shuffle": 3}, "shuffle must be 1 or 2"),
        ({"last": 0}, "last must be positive"),
        ({"chanels": [16, 32]}, "unknown key 'chanels'; did you mean 'channels'"),
    ],
)
def test_wrong_spaces(change: dict[str, object], message: str) -> None:
    plain = {"name": "mine", "blocks": [1, 2], "stem": 8, "channels": [16, 32], "last": 64}
    with pytest.raises(ConfigError, match=message):
        SearchSpace.from_plain(plain | change)


def test_a_space_needs_its_numbers() -> None:
    with pytest.raises(ConfigError, match="got no channels"):
        SearchSpace.from_plain({"name": "mine", "blocks": [1], "stem": 8, "last": 64})
