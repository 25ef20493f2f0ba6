from bnlab.lab.lr_selection import chosen, divergence_remarks, lr_remarks, mark_chosen
from bnlab.lab.records import Records, where


def training(
    arm: str, seed: int, rate: float, val: float, test: float = 0.9, diverged_at: int | None = None
) -> Records:
    return [
        {"arm": arm, "seed": seed, "learning_rate": rate, "step": step, "val_top1": val if step == 20 else 1.0,
         "test_top1": test, "guess": 0.1, "n_test": 100, "diverged_at": diverged_at}
        for step in (10, 20)
    ]  # fmt: skip


TABLES = mark_chosen(
    {
        "accuracy": [
            *training("a", 0, 0.1, 0.5), *training("a", 0, 0.3, 0.7), *training("a", 0, 1.0, 0.6),
            *training("a", 1, 0.1, 0.8), *training("a", 1, 0.3, 0.7), *training("a", 1, 1.0, 0.1, diverged_at=3),
            *training("b", 0, 0.3, 0.5), *training("b", 1, 0.3, 0.5),
        ],
        "other": [{"arm": "a", "seed": 1, "learning_rate": 0.1, "x": 1}, {"arm": "a", "seed": 1, "learning_rate": 0.3}],
    }
)  # fmt: skip


def test_the_best_by_the_last_accuracy_on_val_is_chosen_for_each_arm_and_seed() -> None:
    rows = chosen(TABLES)
    assert {row["learning_rate"] for row in where(rows, arm="a", seed=0)} == {0.3}
    assert {row["learning_rate"] for row in where(rows, arm="a", seed=1)} == {0.1}
    assert len(where(rows, arm="b")) == 4
    assert [row["chosen"] for row in TABLES["other"]] == [1, 0]


def test_rates_at_an_end_and_diverged_trainings_get_a_remark() -> None:
    found = lr_remarks(TABLES)
    assert found == (
        "a: the best learning rate was the lowest tried (0.1) for 1 seed of 2; a better one may lie outside",
        "a: 1 training diverged, at learning rates of 1; one that does counts as guessing",
    )
    assert divergence_remarks(where(TABLES["accuracy"], arm="b")) == ()
