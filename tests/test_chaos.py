"""Ten kills over all recipes, each followed by the same command; `make chaos` gives a hundred and more."""

import chaos
import pytest


@pytest.mark.slow
def test_ten_kills_end_bitwise_where_the_unbroken_runs_end(tmp_path):
    score = chaos.rounds(chaos.World(tmp_path), kills=10, seed="ci")
    print(chaos.table(score))
    assert {recipe for recipe, _, _ in score} == set(chaos.RECIPES)
    assert {verdict for _, _, verdict in score} == {"equal"} and sum(score.values()) == 10
