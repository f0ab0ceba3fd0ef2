"""The jobs of the ablations: their settings are possible, what is there is not done again, and several go at a time."""

import argparse
import json
import subprocess
import sys
from pathlib import Path

import pytest

import ablations
import distill_ablations
import imm_ablations
from mmgen.config import distill, imm
from mmgen.config.sections import nest, read_preset
from mmgen.errors import ConfigError, TrainingError

ROOT = Path(__file__).parents[1]
OPTIONS = argparse.Namespace(images=256_000, every=64_000, samples=64, set=[], jobs=False, job=None, processes=1, minutes=60.0)


def test_all_students_have_possible_settings_and_folders_of_their_own():
    """A name stands for one student, in whatever group; as many updates of the student where the auxiliary has more."""
    preset, known = read_preset("digits-distill", "distill"), {}
    for variant in distill_ablations.VARIANTS:
        settings = distill_ablations.student_settings(variant, 3, 900, 256)
        config = distill.resolve(preset, nest(settings, distill.DistillConfig))
        steps = config.train.max_images // config.train.batch_size
        if config.loss.auxiliary_updates > 1:
            assert steps / (1 + config.loss.auxiliary_updates) == 900 / 2
        elif "as much compute" in variant.name:
            assert steps == 1000  # 4.5 passes an image in place of 5
        assert known.setdefault(ablations.slug(variant.name), settings) == settings, variant.name
        assert config.train.seed == 3 and config.train.batch_size == 256 * variant.batch
    late = next(each for each in distill_ablations.VARIANTS if each.own_from)
    assert distill_ablations.student_settings(late, 0, 100)["student.rollouts_after"] == 6400


def test_all_variants_of_imm_are_possible_and_have_folders_of_their_own():
    preset, known = read_preset("digits-imm", "train-imm"), {}
    for variant in imm_ablations.VARIANTS:
        settings = imm_ablations.settings_for(variant, 1, OPTIONS)
        imm.resolve(preset, nest(settings, imm.ImmConfig))
        assert known.setdefault(imm_ablations.job_name(variant, 1), settings) == settings, variant.name
    assert imm_ablations.shown([64, 128, 192, 256, 320]) == [64, 128, 256, 320]


def test_a_job_is_done_once_and_not_mixed_with_other_settings(tmp_path):
    done = []
    options = argparse.Namespace(**{**vars(OPTIONS), "out": tmp_path})

    def jobs(**conditions):
        return [ablations.Job(name, conditions, lambda name=name: done.append(name) or {"is": name}) for name in ("a", "b")]

    options.minutes = 0.0
    assert ablations.carry_out(jobs(k=(1, 2)), options) and done == []
    options.minutes, options.job = 1.0, "b"
    assert not ablations.carry_out(jobs(k=(1, 2)), options) and done == ["b"]
    options.job = None
    assert ablations.carry_out(jobs(k=(1, 2)), options) and done == ["b", "a"]
    assert ablations.Scores(tmp_path).get(jobs(k=(1, 2))[0]) == {"is": "a"}
    with pytest.raises(TrainingError, match=r"choose another out \(--out\)"):
        ablations.carry_out(jobs(k=(1, 3)), options)
    options.job = "c"
    with pytest.raises(ConfigError, match="no job 'c'"):
        ablations.carry_out(jobs(k=(1, 2)), options)


SCRIPT = """
import argparse, os, sys, time
from ablations import Job, add_options, carry_out
parser = argparse.ArgumentParser()
add_options(parser, "out", "trainings")
options = parser.parse_args()
def work(n):
    if n == options.first_seed:
        raise SystemExit(3)
    time.sleep(9 * (options.seeds == 9))
    return {"threads": os.environ["OMP_NUM_THREADS"], "process": os.getpid()}
try:
    carry_out([Job(f"job-{n}", {}, lambda n=n: work(n)) for n in range(3)], options)
except Exception as error:
    sys.exit(str(error))
"""


@pytest.mark.slow
def test_jobs_go_in_processes_of_their_own_and_one_that_fails_stops_no_other(tmp_path):
    (tmp_path / "script.py").write_text(SCRIPT)

    def start(*arguments):
        paths = {"PYTHONPATH": f"{ROOT}:{ROOT / 'examples'}", "PATH": "/usr/bin:/bin"}
        return subprocess.run([sys.executable, "script.py", *arguments], cwd=tmp_path, env=paths, capture_output=True, text=True)

    failed = start("--processes", "2", "--first-seed", "1")
    assert failed.returncode == 1 and "1 of 3 jobs failed" in failed.stderr
    found = [json.loads(file.read_text())["found"] for file in sorted((tmp_path / "out/scores").iterdir())]
    assert len(found) == 2 and {each["threads"] for each in found} == {"1"} and len({each["process"] for each in found}) == 2
    stopped = start("--processes", "2", "--first-seed", "9", "--seeds", "9", "--minutes", "0.01")  # of the one that is missing
    assert stopped.returncode == 0 and stopped.stderr == "job-1\n" and len(list((tmp_path / "out/scores").iterdir())) == 2
    listed = start("--jobs", "--first-seed", "9").stdout.splitlines()
    assert len(listed) == 1 and listed[0].endswith("script.py --first-seed 9 --job job-1")


def test_variants_are_chosen_by_their_names_in_the_table_or_as_folders():
    assert ablations.chosen(["shift 2"], ["shift 2", "M = 4"]) == {"shift 2"}
    assert ablations.chosen([], ["shift 2", "M = 4"]) == {"shift 2", "M = 4"} and ablations.chosen(["M---4"], ["shift 2", "M = 4"]) == {"M = 4"}
    with pytest.raises(ConfigError, match="no 'shift' here, but shift-2, M---4"):
        ablations.chosen(["shift"], ["shift 2", "M = 4"])


def test_settings_of_all_that_is_compared():
    assert ablations.settings_of(["a.b=1e-3", "c.d=none", "e.f=[1, 2]"]) == {"a.b": 1e-3, "c.d": "none", "e.f": [1, 2]}
    with pytest.raises(ConfigError, match="KEY=VALUE"):
        ablations.settings_of(["a.b"])
    assert [ablations.count(text) for text in ("5000", "5k", "1.5M")] == [5000, 5000, 1_500_000]
