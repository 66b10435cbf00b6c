# SPDX-License-Identifier: Apache-2.0
"""The front-end process refuses settings that cannot work, before any worker starts.

One file, because one front-end process answers all cases.
"""

from __future__ import annotations

import ast
import json
import shutil

import pytest

from vllm_ascend_eplb.adaptors.vllm.versions import CHECKED_VERSIONS
from vllm_ascend_eplb.files.expert_map import write_expert_map
from vllm_ascend_eplb.values.placement import Placement

from .conftest import run_forked, run_script
from .mtp_model import CONFIG
from .offline import MODEL, environment

DRAFTED = {"model": "FILES/mtp", "speculative_config": {"method": "mtp", "num_speculative_tokens": 1}}
"""A model with a draft model in its checkpoint (multi-token prediction); both have experts."""

CASES = {
    "unknown key": ({"dynamic_eplb": True, "num_redundnt_experts": 2}, {}, "num_redundnt_experts"),
    "nearest key": ({"dynamic_eplb": True, "num_redundnt_experts": 2}, {}, "did you mean num_redundant_experts?"),
    "text for a boolean": ({"dynamic_eplb": "ture"}, {}, "did you mean true?"),
    "leftover setting of vLLM's balancer": (
        {"dynamic_eplb": True},
        {"eplb_config": {"num_redundant_experts": 2}},
        '"dynamic_eplb": true, "num_redundant_experts": 2}}\'',
    ),
    "setting beside eplb_config": (
        None,
        {"additional_config": {"num_wait_woker_iterations": 50, "eplb_config": {"dynamic_eplb": True}}},
        '{"eplb_config": {"algorithm_execution_interval": 50}}',
    ),
    "eplb_config misspelt": (
        None,
        {"additional_config": {"eplb-config": {"dynamic_eplb": True}}},
        "the key is eplb_config",
    ),
    "eplb_config nested": (
        None,
        {"additional_config": {"additional_config": {"eplb_config": {"dynamic_eplb": True}}}},
        "to the top level",
    ),
    "interval": ({"dynamic_eplb": True, "expert_heat_collection_interval": 0}, {}, "expert_heat_collection_interval"),
    "not divisible": ({"dynamic_eplb": True, "num_redundant_experts": 3}, {}, "nearest that works: 2 or 4"),
    "too redundant": ({"dynamic_eplb": True, "num_redundant_experts": 66}, {}, "is more than 64"),
    "no expert parallelism": ({"dynamic_eplb": True}, {"enable_expert_parallel": False}, "--enable-expert-parallel"),
    "one rank": ({"dynamic_eplb": True}, {"tensor_parallel_size": 1}, "needs 2 or more ranks"),
    "vLLM's own": ({"dynamic_eplb": True}, {"enable_eplb": True}, "--enable-eplb turns on vLLM's own balancer"),
    "not a MoE model": ({"dynamic_eplb": True}, {"model": "FILES/dense"}, "without experts"),
    "model without the protocol": (
        {"dynamic_eplb": True},
        {"model": "FILES/qwen2"},
        "does not implement the MixtureOfExperts protocol (allowed: ",
    ),
    "map path": ({"expert_map_path": "/nowhere/map.json"}, {}, "/nowhere/map.json"),
    "map for other ranks": ({"expert_map_path": "FILES/4ranks.json"}, {}, "is for 4 devices, the server has 2 ranks"),
    "map with other layers": ({"expert_map_path": "FILES/7layers.json"}, {}, "has 7 MoE layers, the model has 6"),
    "map of other experts": (
        {"expert_map_path": "FILES/66experts.json"},
        {},
        "layer 0, device 1, slot 31 holds expert 64; the model has experts 0..63",
    ),
    "map of other redundancy": (
        {"expert_map_path": "FILES/good.json", "num_redundant_experts": 4, "dynamic_eplb": True},
        {},
        "good.json has 2 redundant experts per layer, eplb_config.num_redundant_experts is 4",
    ),
    "record path": ({"expert_map_record_path": "/nowhere/map.json"}, {}, "/nowhere/map.json"),
    "map for a pipeline": (
        {"dynamic_eplb": True, "expert_map_record_path": "FILES/recorded.json"},
        {"pipeline_parallel_size": 2},
        "an expert_map_record_path and --pipeline-parallel-size 2 is not supported",
    ),
    "weight cache": (
        {"dynamic_eplb": True},
        {"load_format": "ipc_cache"},
        "--load-format ipc_cache is not supported",
    ),
    "adapters": ({"dynamic_eplb": True}, {"enable_lora": True}, "--enable-lora True is not supported"),
    "weights on the host": ({"dynamic_eplb": True}, {"cpu_offload_gb": 1}, "--cpu-offload-gb 1.0 is not supported"),
    "layers on the host": (
        {"dynamic_eplb": True},
        {"offload_group_size": 2},
        "--offload-group-size 2 is not supported",
    ),
    "sleep": (
        {"dynamic_eplb": True},
        {"set": {"model_config": {"enable_sleep_mode": True}}},
        '--enable-sleep-mode and "transport" auto is not supported',
    ),
    "elastic": (
        {"dynamic_eplb": True},
        {"set": {"parallel_config": {"enable_elastic_ep": True}}},
        "--enable-elastic-ep True is not supported",
    ),
    "draft model and context parallelism": (
        {"dynamic_eplb": True},
        {**DRAFTED, "set": {"parallel_config": {"prefill_context_parallel_size": 2}}},
        "a draft model with experts and --prefill-context-parallel-size 2 is not supported",
    ),
    "draft model and context parallelism in decoding": (
        {"dynamic_eplb": True},
        {**DRAFTED, "set": {"parallel_config": {"decode_context_parallel_size": 2}}},
        "a draft model with experts and --decode-context-parallel-size 2 is not supported",
    ),
    "draft model with experts": (
        {"dynamic_eplb": True},
        {"speculative_config": {"method": "draft_model", "model": str(MODEL), "num_speculative_tokens": 2}},
        "--speculative-config with a draft model with experts, of method draft_model is not supported",
    ),
    "draft model and pipeline stages": (
        {"dynamic_eplb": True},
        {**DRAFTED, "set": {"parallel_config": {"pipeline_parallel_size": 2}}},
        "a draft model with experts and --pipeline-parallel-size 2 is not supported",
    ),
    "draft model and several engines of several ranks": (
        {"dynamic_eplb": True},
        {**DRAFTED, "data_parallel_size": 2},
        "a draft model with experts and --data-parallel-size with --tensor-parallel-size 2 is not supported",
    ),
    "draft model and weight updates": (
        {"dynamic_eplb": True},
        {**DRAFTED, "weight_transfer_config": {"backend": "nccl"}},
        "--weight-transfer-config and a draft model with experts True is not supported",
    ),
    "Ray": (
        {"dynamic_eplb": True},
        {"set": {"parallel_config": {"distributed_executor_backend": "ray"}}},
        "--distributed-executor-backend ray is not supported",
    ),
    "Ray for the engines": (
        {"dynamic_eplb": True},
        {"set": {"parallel_config": {"data_parallel_backend": "ray"}}},
        "--data-parallel-backend ray is not supported",
    ),
    "launched from outside": (
        {"dynamic_eplb": True},
        {"set": {"parallel_config": {"distributed_executor_backend": "external_launcher"}}},
        "--distributed-executor-backend external_launcher is not supported",
    ),
    "NCCL beside cooperative kernels": (
        {"dynamic_eplb": True, "transport": "nccl"},
        {"set": {"parallel_config": {"all2all_backend": "deepep_low_latency"}}},
        '"transport": "nccl" and --all2all-backend deepep_low_latency is not supported',
    ),
    "NCCL beside a megakernel": (
        {"dynamic_eplb": True, "transport": "nccl"},
        {"set": {"kernel_config": {"moe_backend": "deep_gemm_mega_moe"}}},
        '"transport": "nccl" and --moe-backend deep_gemm_mega_moe is not supported',
    ),
    "all2all backend with weights of its own": (
        {"dynamic_eplb": True},
        {"set": {"parallel_config": {"all2all_backend": "moonep"}}},
        "--all2all-backend moonep is not supported",
    ),
    "megakernel that vLLM does not balance": (
        {"dynamic_eplb": True},
        {"set": {"kernel_config": {"moe_backend": "flashinfer_moe_ep_mega_deep_gemm"}}},
        "--moe-backend flashinfer_moe_ep_mega_deep_gemm is not supported",
    ),
    "frozen weights": (
        {"dynamic_eplb": True},
        {"compilation_config": {"inductor_compile_config": {"freezing": True}}},
        "inductor_compile_config.freezing True is not supported",
    ),
    "frozen by tuning": (
        {"dynamic_eplb": True},
        {"compilation_config": {"inductor_compile_config": {"max_autotune": True}}},
        "inductor_compile_config.max_autotune True is not supported",
    ),
}

CODE = """
import json, sys
from vllm.engine.arg_utils import EngineArgs
from vllm_ascend_eplb.plugin import register

plain = EngineArgs.create_engine_config

def changed(self, *args, **kwargs):
    # vLLM itself refuses some options on a CPU, so they are set after its checks
    config = plain(self, *args, **kwargs)
    for part, values in changes.items():
        for name, value in values.items():
            setattr(getattr(config, part), name, value)
    return config

EngineArgs.create_engine_config = changed
register()
register()  # vLLM may load plugins twice
answers = {}
for name, (settings, arguments) in json.load(open(sys.argv[2])).items():
    given = dict(model=sys.argv[1], tensor_parallel_size=2, enable_expert_parallel=True, dtype="float32")
    changes = arguments.pop("set", {})
    given.update(arguments)
    if settings is not None:
        given.update(additional_config={"eplb_config": settings})
    try:
        config = EngineArgs(**given).create_engine_config()
    except Exception as error:
        answers[name] = {"error": type(error).__name__, "message": str(error)}
    else:
        parallel = config.parallel_config
        answers[name] = {
            "enable_eplb": parallel.enable_eplb,
            "worker_cls": parallel.worker_cls,
            "redundant": parallel.eplb_config.num_redundant_experts,
            "adaptor": "vllm_ascend_eplb.adaptors.vllm.state" in sys.modules,
        }
print("ANSWERS" + json.dumps(answers))
"""


@pytest.fixture(scope="module")
def answers(tmp_path_factory, nursery):
    files = tmp_path_factory.mktemp("files")
    ours = json.loads((MODEL / "config.json").read_text())
    dense = {key: value for key, value in ours.items() if "expert" not in key and "moe" not in key}
    qwen2 = {**ours, "architectures": ["Qwen2MoeForCausalLM"], "model_type": "qwen2_moe"}
    configs = {
        "dense": {**dense, "architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3"},
        "mtp": CONFIG,
        "qwen2": {**qwen2, "shared_expert_intermediate_size": 64},
    }
    for folder, config in configs.items():
        (files / folder).mkdir()
        (files / folder / "config.json").write_text(json.dumps(config))
        for name in ("tokenizer.json", "tokenizer_config.json"):
            shutil.copy(MODEL / name, files / folder)
    for name, shape in (("4ranks", (6, 64, 4, 4)), ("7layers", (7, 64, 2)), ("66experts", (6, 66, 2))):
        write_expert_map(files / f"{name}.json", Placement.initial(*shape))
    write_expert_map(files / "good.json", Placement.initial(6, 64, 2, 2))
    asked = {name: (settings, arguments) for name, (settings, arguments, _) in CASES.items()}
    asked["map"] = ({"expert_map_path": "FILES/good.json"}, {})
    asked["off"] = ({}, {})
    asked["off in words"] = ({"dynamic_eplb": "false", "unknown": 1}, {})
    asked["on in words"] = ({"dynamic_eplb": "true", "num_redundant_experts": "4"}, {})
    asked["absent"] = (None, {})
    asked["on"] = ({"dynamic_eplb": True, "num_redundant_experts": 4}, {})
    asked["stages"] = ({"dynamic_eplb": True}, {"pipeline_parallel_size": 2})
    asked["slices"] = ({"dynamic_eplb": True}, {"data_parallel_size": 2})
    asked["engines in stages"] = ({"dynamic_eplb": True}, {"pipeline_parallel_size": 2, "data_parallel_size": 2})
    drafts = {"method": "ngram", "num_speculative_tokens": 2}
    asked["drafts"] = ({"dynamic_eplb": True}, {"speculative_config": drafts})
    asked["draft model"] = ({"dynamic_eplb": True}, DRAFTED)
    (files / "asked.json").write_text(json.dumps(asked).replace("FILES/", f"{files}/"))
    done = run_script(nursery, files / "run", CODE, str(MODEL), str(files / "asked.json"))
    assert done.code == 0, done.log[-4000:]
    line = next(line for line in done.log.splitlines() if line.startswith("ANSWERS"))
    return json.loads(line.removeprefix("ANSWERS"))


@pytest.mark.parametrize("name", CASES)
def test_setting_that_cannot_work_is_refused_with_a_message(answers, name):
    answer = answers[name]
    assert answer.get("error") == "EplbConfigError", answer
    assert CASES[name][2] in answer["message"]
    assert "\n" not in answer["message"]


@pytest.mark.parametrize("name", ["off", "absent", "off in words"])
def test_vllm_is_configured_as_usual_without_the_flag(answers, name):
    assert answers[name] == {
        "enable_eplb": False,
        "worker_cls": "vllm.v1.worker.cpu_worker.CPUWorker",
        "redundant": 0,
        "adaptor": False,
    }


def test_flag_turns_balancing_on(answers):
    assert answers["on"]["enable_eplb"] is True
    assert answers["on"]["redundant"] == 4
    assert answers["on"]["worker_cls"].count("vllm_ascend_eplb.") == 1
    assert answers["on in words"] == {**answers["on"], "adaptor": answers["on in words"]["adaptor"]}


def test_redundant_experts_come_from_the_map(answers):
    assert answers["map"]["enable_eplb"] is True
    assert answers["map"]["redundant"] == 2


@pytest.mark.parametrize("name", ["stages", "slices", "engines in stages", "drafts", "draft model"])
def test_supported_options_are_accepted(answers, name):
    assert answers[name].get("enable_eplb") is True, answers[name]


UNCHECKED = """
import sys, vllm
from vllm.engine.arg_utils import EngineArgs
vllm.__version__ = "0.99.1"
for allow in (False, True):
    settings = {"dynamic_eplb": True, "allow_unchecked_vllm": allow}
    config = EngineArgs(model=sys.argv[1], tensor_parallel_size=2, enable_expert_parallel=True,
                        additional_config={"eplb_config": settings}).create_engine_config()
    print("ENABLED", config.parallel_config.enable_eplb)

# On a GPU vLLM's own checks of its switch must see the switch set; on an unchecked version it is not set.
from vllm.config.parallel import EPLBConfig
from vllm_ascend_eplb.adaptors import front_end
type(vllm.platforms.current_platform).is_cpu = lambda self: False

class Arguments:
    def __init__(self, **settings):
        self.additional_config = {"eplb_config": {"dynamic_eplb": True, **settings}}
        self.enable_eplb, self.eplb_config, self.enable_expert_parallel = False, EPLBConfig(), True
    def create_engine_config(self):
        seen = [self.enable_eplb, self.eplb_config.num_redundant_experts, self.eplb_config.use_async]
        print("CHECKS SEE", seen if self.enable_eplb else [False, self.eplb_config is not given.eplb_config])
        raise SystemError

front_end.hook(Arguments)
for allow in (False, True):
    given = Arguments(num_redundant_experts=4, allow_unchecked_vllm=allow)
    try:
        given.create_engine_config()
    except SystemError:
        print("GIVEN", given.enable_eplb, given.eplb_config.num_redundant_experts)
"""


def test_unchecked_vllm_is_left_alone_and_gpus_see_switch(nursery, tmp_path):
    done = run_script(nursery, tmp_path, UNCHECKED, str(MODEL))
    assert done.code == 0, done.log[-4000:]
    assert "CHECKS SEE [False, False]" in done.log
    assert "CHECKS SEE [True, 4, False]" in done.log
    assert "GIVEN False 0" in done.log
    assert done.log.count("ENABLED False") == 1
    assert done.log.count("ENABLED True") == 1
    assert done.log.count("EPLB stays off: it was checked against vLLM") == 1


NEWER = """
import sys, vllm
from vllm.engine.arg_utils import EngineArgs
from vllm_ascend_eplb.plugin import register
register()
vllm.__version__ = sys.argv[2]
config = EngineArgs(model=sys.argv[1], tensor_parallel_size=2, enable_expert_parallel=True,
                    additional_config={"eplb_config": {"dynamic_eplb": True}}).create_engine_config()
print("ENABLED", config.parallel_config.enable_eplb)
"""


def test_newer_vllm_is_balanced_with_a_warning(nursery, tmp_path):
    """This is one release after the checked ones, so the self-test reads the installed sources."""
    major, minor = CHECKED_VERSIONS[-1].split(".")
    done = run_script(nursery, tmp_path, NEWER, str(MODEL), f"{major}.{int(minor) + 1}.0")
    assert done.code == 0, done.log[-4000:]
    assert "ENABLED True" in done.log
    assert done.log.count("the self-test found every patch point unchanged") == 1


PATCH_POINTS = """
from vllm_ascend_eplb.adaptors.vllm.patch_points import missing_patch_points
print("MISSING", missing_patch_points("cpu"))
import vllm.distributed.eplb.eplb_state as eplb_state
kept = eplb_state.EplbLayerState
del eplb_state.EplbLayerState
print("PLANTED", missing_patch_points("cpu"))
eplb_state.EplbLayerState = kept

# The V2 runner's hooks around vLLM's own controller and decorator, in a stand-in that calls them as the V2 runner does.
from types import SimpleNamespace

def asked(**tokens):
    return SimpleNamespace(num_scheduled_tokens=tokens, total_num_scheduled_tokens=sum(tokens.values()))

from vllm.v1.worker.gpu.eplb_utils import EPLBController, step_eplb_after
from vllm_ascend_eplb.adaptors.errors import PatchPointError
from vllm_ascend_eplb.adaptors.vllm import cpu
from vllm_ascend_eplb.adaptors.vllm.runner import hook_runner

class State:
    should_record_tensor = None
    def __getattr__(self, name):
        return lambda *args, **kwargs: said.append((name, kwargs.get("serving"), kwargs.get("stage")))

class Runner:
    decode_query_len = 1
    def __init__(self):
        parallel = SimpleNamespace(enable_eplb=True, eplb_config=SimpleNamespace(log_balancedness=False))
        self.eplb = EPLBController(parallel, "cpu")
        self.eplb.state, self.eplb._has_registered_models = State(), True
    eplb_state = property(lambda self: self.eplb.state)
    def execute_model(self, scheduler_output, dummy_run=False, is_profile=False):
        said.append(("data parallel", None, None))
        if scheduler_output.num_scheduled_tokens:
            self.eplb.prepare_forward(None, 3)
            said.append(("model", None, None))
    @step_eplb_after()
    def sample_tokens(self):
        pass
    @step_eplb_after(is_dummy=True)
    def _dummy_run(self, num_tokens, skip_eplb=False, is_profile=False):
        self.execute_model(asked(a=num_tokens), dummy_run=True)

runner, said = Runner(), []
hook_runner(runner)
def show(what, call):
    said.clear()
    call()
    print("V2", what, [" ".join(filter(None, (name, {True: "real", False: "dummy", None: ""}[serving], stage)))
                       for name, serving, stage in said])
show("prefill", lambda: runner.execute_model(asked(a=5, b=1)))
show("decode", lambda: (runner.execute_model(asked(a=1)), runner.sample_tokens()))
show("nothing", lambda: runner.execute_model(asked()))
show("dummy", lambda: runner._dummy_run(4))
show("profile", lambda: runner._dummy_run(4, is_profile=True))
show("capture", lambda: runner._dummy_run(4, skip_eplb=True))
try:
    hook_runner(SimpleNamespace())
except PatchPointError as error:
    print("NEITHER", error)

import sys, vllm.models.deepseek_v4.nvidia.model  # imports the function by name, itself or in what it imports
mapping = "eplb_map_to_physical_and_record"
routers = "vllm.model_executor.layers.fused_moe.router."
(by_name, *_) = [module for name, module in sys.modules.items()
                 if name.startswith("vllm.") and not name.startswith(routers) and hasattr(module, mapping)]
cpu.replace_router_mapping()
print("BY NAME", getattr(by_name, mapping) is cpu.eplb_map_to_physical_and_record)
"""

COPIES = """
import sys
from vllm.engine.arg_utils import EngineArgs
from vllm_ascend_eplb.plugin import register
register()
settings = {"dynamic_eplb": True, "num_redundant_experts": 4, "allow_unchecked_vllm": True}
config = EngineArgs(model=sys.argv[1], tensor_parallel_size=2, enable_expert_parallel=True,
                    additional_config={"eplb_config": settings}).create_engine_config()
from vllm_ascend_eplb.adaptors.vllm import worker as workers
for worker in (False, True):
    if worker:
        workers.take_over()
    try:
        copy = config.with_hf_config(config.model_config.hf_config)
        print("COPY", copy.parallel_config.enable_eplb, copy.parallel_config.eplb_config.num_redundant_experts)
    except ValueError as error:
        print("REFUSED", "load balancing is only supported on" in str(error))
"""


def test_bad_setting_ends_the_server_before_workers_start(nursery, tmp_path):
    """The server's command line, in a forked front end, ends without starting any process."""
    settings = {"eplb_config": {"dynamic_eplb": True, "num_redundant_experts": 3}}
    command = ["vllm.entrypoints.openai.api_server", "--model", str(MODEL), "--dtype", "float32", "--port", "0"]
    command += ["--tensor-parallel-size", "2", "--enable-expert-parallel", "--enforce-eager"]
    command += ["--additional-config", json.dumps(settings)]
    done = run_forked(nursery, "nursery:run_module", command, tmp_path / "log", environment(2))
    assert done.code not in (0, -9), done.log[-4000:]
    assert "eplb_config.num_redundant_experts = 3: 64 experts + 3 cannot be shared evenly by 2 ranks" in done.log
    assert "EngineCore" not in done.log
    assert done.left == []


def test_worker_on_a_cpu_may_copy_its_configuration(nursery, tmp_path):
    """Multimodal models copy the configuration in a worker."""
    done = run_script(nursery, tmp_path, COPIES, str(MODEL))
    assert done.code == 0, done.log[-4000:]
    assert [line for line in done.log.splitlines() if line.startswith(("COPY", "REFUSED"))] == [
        "REFUSED True",
        "COPY True 4",
    ]


def test_missing_patch_point_is_named_and_v2_steps_right(nursery, tmp_path):
    """A missing patch point is named, and the V2 runner calls the balancer at the right points of a step."""
    done = run_script(nursery, tmp_path, PATCH_POINTS)
    assert done.code == 0, done.log[-4000:]
    assert "MISSING []" in done.log
    planted = next(line for line in done.log.splitlines() if line.startswith("PLANTED"))
    assert "vllm.distributed.eplb.eplb_state.EplbLayerState (gives each router its maps and counters)" in planted
    v2 = dict(line.removeprefix("V2 ").split(" ", 1) for line in done.log.splitlines() if line.startswith("V2 "))
    assert {what: ast.literal_eval(said) for what, said in v2.items()} == {
        "prefill": ["data parallel", "prepare_forward", "forward_before real prefill", "model"],
        "decode": ["data parallel", "prepare_forward", "forward_before real decode", "model", "step"],
        "nothing": ["data parallel"],
        "dummy": [
            "count_nothing",
            "data parallel",
            "prepare_forward",
            "forward_before dummy decode",
            "model",
            "step",
        ],
        "profile": ["count_nothing", "data parallel", "prepare_forward", "model", "step"],
        "capture": ["count_nothing", "data parallel", "prepare_forward", "model"],
    }
    assert "NEITHER SimpleNamespace is neither vLLM's V1 nor its V2 runner" in done.log
    assert "BY NAME True" in done.log
