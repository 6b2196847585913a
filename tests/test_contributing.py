"""CONTRIBUTING.md is true: its examples run as they stand there, and the files it names exist."""

from __future__ import annotations

import importlib
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import numpy as np
import pipeline
import pytest
from learner_builders import scored_batch

from asyncopd.config import load_config
from asyncopd.config.losses import ESTIMATORS
from asyncopd.config.recorded import CacheRequirements, check_cache
from asyncopd.errors import ConfigError
from asyncopd.losses import build_estimator
from asyncopd.ports import Scorer, ScoreRequest, Task
from asyncopd.tasks.build import build_task
from asyncopd.types import ScoredTrajectory

ROOT = Path(__file__).parent.parent
PAGE = (ROOT / "CONTRIBUTING.md").read_text()
SETTINGS, FUNCTION, TEST, TASK, TEACHER = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)

TEST_IMPORTS = """
import math
import numpy as np, pytest
from losses_world import expectation, make_world
from asyncopd.config import load_config
"""
TASK_IMPORTS = """
from collections.abc import Sequence
import numpy as np
from asyncopd.models.random import stream_key
from asyncopd.ports import Demonstration, Tokenizer
from asyncopd.tasks.prompts import ShuffledStream
from asyncopd.tasks.tokenizers import VocabTokenizer
from asyncopd.types import Prompt, Split
"""
TEACHER_IMPORTS = """
import hashlib
from collections.abc import Sequence
import numpy as np
from asyncopd.ports import ScoreRequest, Task
from asyncopd.teacher.rows import RowTable, scores_from_rows
from asyncopd.types import TeacherScores, Trajectory
"""


@pytest.fixture
def written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder to write modules of the page to; what they register is forgotten afterwards."""
    folder = tmp_path / "modules"
    folder.mkdir()
    monkeypatch.syspath_prepend(folder)
    monkeypatch.setattr(ESTIMATORS, "_by_name", dict(ESTIMATORS._by_name))
    yield folder
    for path in folder.glob("*.py"):
        sys.modules.pop(path.stem, None)


def module(folder: Path, name: str, imports: str, code: str) -> ModuleType:
    (folder / f"{name}.py").write_text(f"{imports}\n\n{code}")
    return importlib.import_module(name)


def add_estimator(folder: Path) -> None:
    """The two additions of the page, each in a module that sees what its file in asyncopd/ sees."""
    module(folder, "page_settings", "from asyncopd.config.losses import *", SETTINGS)
    module(folder, "page_function", "from page_settings import *\nfrom asyncopd.losses.divergences import *", FUNCTION)


def test_the_estimator_of_the_page_equals_its_reference(written: Path) -> None:
    add_estimator(written)
    tests = module(written, "page_test", TEST_IMPORTS, TEST)
    tests.test_squared_gap_equals_the_mathematics_in_value_and_gradient()


async def test_the_estimator_of_the_page_is_configured_recorded_and_trained(tmp_path: Path, written: Path) -> None:
    before = [kind.model_fields["name"].default for kind in ESTIMATORS]
    add_estimator(written)
    assert [kind.model_fields["name"].default for kind in ESTIMATORS] == [*before, "squared_gap"]

    config = pipeline.small_config(
        tmp_path, loss={"name": "squared_gap", "top_k": 3}, learner__num_steps=1, evaluate__every=0
    )
    assert config == load_config(config.model_dump(mode="json"))
    assert config.cached() == CacheRequirements(top_k=3)
    assert "squared_gap" in str(type(config).model_json_schema())
    with pytest.raises(ConfigError, match=r"squared_gap has no option 'topk'\. Nearest: 'top_k'"):
        load_config({"loss": {"name": "squared_gap", "topk": 3}})
    with pytest.raises(ConfigError, match=r"no estimator is called 'squared_gab'\. Nearest: 'squared_gap'"):
        load_config({"loss": {"name": "squared_gab"}})
    with pytest.raises(ConfigError, match=r"topk_logprobs holds 2 ids.*needed are 3"):
        check_cache(config.loss.requirements(), CacheRequirements(top_k=2), run_id="r1")

    run = pipeline.new_run(config)
    await pipeline.run_all(run)
    (step,) = run.log.steps()
    (shard, *_) = config.plan.shards_of_step(0)
    assert run.log.read_scores(config.teacher.name, shard)[0].topk_ids_TK.shape[1] == 3
    assert step.metrics["train/loss_nats"] > 0
    assert 0 < step.metrics["loss/support_mass_student"] <= 1
    assert step.metrics["train/grad_norm"] > 0
    assert run.log.latest_policy().number == 1


def test_an_estimator_without_function_and_a_name_that_is_taken_are_refused(written: Path) -> None:
    module(written, "page_settings", "from asyncopd.config.losses import *", SETTINGS)
    with pytest.raises(ConfigError, match="'squared_gap' has settings"):
        build_estimator(load_config({"loss": {"name": "squared_gap"}}).loss)
    with pytest.raises(ValueError, match="'squared_gap' is taken by SquaredGapConfig"):
        module(written, "again", "from asyncopd.config.losses import *", SETTINGS)


def test_the_task_of_the_page_is_one(written: Path) -> None:
    task: Task = module(written, "page_task", TASK_IMPORTS, TASK).ReverseTask(seed=1)
    ids = {split: {task.prompt(index, split).prompt_id for index in range(300)} for split in ("train", "eval")}
    assert not ids["train"] & ids["eval"]
    for index in range(20):
        prompt, shown = task.prompt(index, "train"), task.demonstration(index, "train")
        assert len(prompt.ids) <= task.max_prompt_tokens
        assert task.verify(prompt, shown.response_ids.tolist())
        assert not task.verify(prompt, [])
        assert not task.verify(prompt, shown.response_ids.tolist()[:-1])
    assert task.tokenizer.decode(task.prompt(0, "train").ids.tolist()).endswith("=")


async def test_the_teacher_of_the_page_scores_what_a_loss_asks_for(written: Path) -> None:
    task = build_task(load_config({}).task, seed=0)
    bigrams = module(written, "page_teacher", TEACHER_IMPORTS, TEACHER).BigramScorer
    teacher: Scorer = bigrams(task, 50)
    trajectories = [scored.trajectory for scored in scored_batch((1, 5, 9))]
    request = ScoreRequest(top_k=4, num_teacher_draws=2, temperature=1.0, seed=0)
    for trajectory, scores in zip(trajectories, await teacher.score(trajectories, request), strict=True):
        assert ScoredTrajectory(trajectory, scores).scores.topk_ids_TK.shape == (len(trajectory.response_ids), 4)
        assert np.isfinite(scores.sampled_logprobs_T).all()
    assert teacher.digest != bigrams(task, 51).digest
    await teacher.close()


def test_the_stored_question_of_the_page_is_the_one_in_the_tree() -> None:
    (sql,) = re.findall(r"```sql\n(.*?)```", PAGE, re.DOTALL)
    assert sql == (ROOT / "storage" / "catalog" / "queries" / "kl_by_version.sql").read_text()


def test_every_file_that_the_page_names_exists() -> None:
    named = set(re.findall(r"`((?:asyncopd|storage|flows|tests|docs)/[\w/.-]+|[A-Z]+\.md)`", PAGE))
    examples = {"tests/test_losses_squared_gap.py", "asyncopd/tasks/NAME.py", "asyncopd/teacher/NAME.py"}
    examples.add("storage/catalog/queries/NAME.sql")
    assert named > examples
    assert [name for name in sorted(named - examples) if not (ROOT / name).exists()] == []
