"""Settings from hostile hands: TOML files, and `--set` of every setting of every training command."""

from __future__ import annotations

import json

import pytest
from hostile import answered, refused, tried

from mmgen.config import sections as configs
from mmgen.config import distill as distill_config, imm as imm_config, teacher as teacher_config
from mmgen.errors import MmgenError
from mmgen.system.schema import flatten

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("own_cache")]
COMMANDS = {"train-imm": imm_config.ImmConfig, "train-teacher": teacher_config.TeacherConfig,
            "distill": distill_config.DistillConfig}  # fmt: skip
RESOLVE = {"train-imm": imm_config.resolve, "train-teacher": teacher_config.resolve, "distill": distill_config.resolve}

TOML = {
    "a million keys": "[loss]\n" + "".join(f"k{i} = {i}\n" for i in range(1_000_000)),
    "deep lists": "[loss]\nk = " + "[" * 30_000 + "]" * 30_000,
    "deep tables": "[loss]\nk = " + "{a=" * 20_000 + "1" + "}" * 20_000,
    "a deep key": ".".join(["loss"] * 10_000) + " = 1",
    "a deep header": "[" + ".".join(["loss"] * 10_000) + "]\n" + "".join(f"k{i} = 1\n" for i in range(1000)),
    "unclosed": "[loss\nk = 1",
    "twice": "[loss]\nk = 1\nk = 2",
    "no section": "k = 1",
    "a scalar for a section": "loss = 1",
    "lists for sections": "loss = [1]\nnetwork = []\ndata = [[1]]",
    "a list of tables": "[[loss]]\nk = 1\n[[loss]]\nk = 2",
    "data": "data = 'digits'",
    "the data's name": "[data]\nname = 5",
    "the data's name, a list": "[data]\nname = [['digits']]",
    "the data's name, a table": "[data.name]\nx = 1",
    "the data's name, a zero": '[data]\nname = "a\\u0000b"',
    "another command": "command = 'distil'\n",
    "the command, a list": "command = ['train-imm']\n",
    "the command, a number": f"command = 0x{'f' * 10_000}\n",
    "a long number": f"[loss]\ngroup_size = {'9' * 6000}\n",
    "a long number in hex": f"[loss]\ngroup_size = 0x{'f' * 10_000}\n",
    "a long number in a list": f"[train]\nema_betas = [0x{'f' * 10_000}]\n",
    "a long float": f"[loss]\na = 1e{'9' * 5000}\n",
    "1e999": "[loss]\na = 1e999\n",
    "nan": "[loss]\na = nan\n",
    "-inf": "[loss]\na = -inf\n",
    "a date": "[loss]\na = 1979-05-27\n",
    "a long text": "[loss]\nkernel = '" + "x" * 60_000 + "'\n",
    "a long name": "[loss]\n" + "x" * 60_000 + " = 1\n",
    "odd names": '[loss]\n"\\u0000\\n\\u001b[31m" = 1\n',
    "the network's kind": "[network]\nkind = ['unet']\n",
    "the network's kind, a number": "[network]\nkind = 1\n",
    "a network": "network = 'unet'",
    "a list of 60,000": "[network]\nchannel_mult = [" + "1," * 30_000 + "]\n",
    "many averages": "[train]\nema_betas = [" + "0.5," * 10_000 + "]\n",
}  # fmt: skip
BYTES = {
    "binary": bytes(range(256)) * 100,
    "zeros": bytes(100),
    "UTF-16": "[loss]\nk = 1\n".encode("utf-16"),
    "a picture": b"\x89PNG\r\n\x1a\n" + bytes(50),
    "not UTF-8": b"[loss]\nkernel = '\xff'\n",
}


@pytest.mark.parametrize("name", [*TOML, *BYTES])
def test_toml(name, tmp_path):
    """As --config of each training command."""
    file = tmp_path / "settings.toml"
    file.write_bytes(BYTES[name] if name in BYTES else TOML[name].encode())
    for command in COMMANDS:
        more = ["--teacher", "nowhere.pt"] if command == "distill" else []
        refused(command, "--config", file, "--dry-run", *more, status=2)


def test_a_file_without_end():
    refused("train-imm", "--config", "/dev/zero", "--dry-run", status=2)


def test_a_sparse_file(tmp_path):
    with open(tmp_path / "large.toml", "wb") as file:
        file.truncate(2**40)
    refused("train-imm", "--config", tmp_path / "large.toml", "--dry-run", status=2)


@pytest.mark.parametrize("text", ["", "=", "=1", "loss", "loss=1", "loss.k", "a.b.c=1", ".=1", "loss.=1", "loss..k=1", ".k=1",
                                  "network=5", "network={}", "network={kind=1}", "network.kind=[]", "data=1", "data=[]",
                                  "data.name=[]", "train.seed.x=1", "train.seed={x=1}", "loss.k=", "loss.k=[", "loss.k=1\nb=2",
                                  "loss.k=" + "[" * 10_000, "loss.k=" + "9" * 5000, "x" * 100_000 + "=1",
                                  "loss." + "k." * 5000 + "k=1", "loss\0.k=1", "data.name=a\0b"])  # fmt: skip
@pytest.mark.parametrize("command", COMMANDS)
def test_odd_assignments(command, text):
    more = ["--teacher", "nowhere.pt"] if command == "distill" else []
    refused(command, "--set", text, "--dry-run", *more, status=(2, 4) if text == "data.name=a\0b" else 2)


def test_assignments_of_a_whole_and_its_parts():
    for first, second in (("network=1", "network.kind=dit"), ("train.seed=1", "train.seed.x=2"), ("loss.k=1", "loss.k.k.k=1")):
        refused("train-imm", "--set", first, "--set", second, "--dry-run", status=2)


VALUES = ["nan", "-inf", "1e999", "-1", "0", "1e308", "1e-320", "10" * 200, str(10**17), '"ten"', "[[]]", "[nan]", "{a=1}", ""]


@pytest.mark.parametrize("command", COMMANDS)
def test_every_setting(command):
    """Every setting of every section with every value: the config is refused with a sentence, or is one."""
    cls, resolve = COMMANDS[command], RESOLVE[command]
    keys = [key for key, _ in flatten(cls().to_dict())]
    for key in keys:
        for value in VALUES:
            tried.append(f"{command} {key}={value[:20]}")
            try:
                config = resolve(configs.nest(dict([configs.parse_assignment(f"{key}={value}")]), cls))
            except MmgenError as error:
                assert "\n" not in str(error) and len(str(error)) < 5000
            else:
                json.dumps(config.to_dict(), allow_nan=False)


def test_json_values_that_toml_has_not():
    """From the header of a model file: null, and numbers as texts."""
    for content in (None, [], 1, "x", {"loss": None}, {"loss": []}, {"loss": {"k": None}}, {"loss": {"k": "1"}}, {1: 2}):
        answered(configs.from_dict, imm_config.ImmConfig, content)
