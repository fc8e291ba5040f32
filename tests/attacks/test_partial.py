"""Attacks on a part of the model: exactly that part trains, adapters leave the weights alone, rebuilt models are fresh."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from specdef.attacks.attack import Attack, Prepared
from specdef.attacks.full import FullTraining
from specdef.attacks.partial.cost import step_work
from specdef.attacks.partial.freeze import PATTERNS, TrainOnly
from specdef.attacks.partial.head import FreshHead
from specdef.attacks.partial.ia3 import IA3
from specdef.attacks.partial.lora import LoRA
from specdef.attacks.partial.prompt import PromptTuning
from specdef.attacks.rebuild.distil import Distil
from specdef.attacks.rebuild.scratch import Scratch
from specdef.attacks.rebuild.twin import fresh_twin
from specdef.attacks.run import Run
from specdef.attacks.task import Budget, Setting, Task
from specdef.curvature.losses import MSELoss, model_outputs
from specdef.errors import SpecDefError
from specdef.lock.compensated import Compensated, compensated_layers
from specdef.lock.config import LockConfig
from specdef.lock.deformation.divergence import kl_terms
from specdef.lock.in_memory import lock_model
from specdef.models.tiny import TINY_FAMILIES, tiny_inputs, tiny_model

ADAPTERS = (LoRA(), LoRA(targets="all"), LoRA(targets="all", dora=True), IA3(), PromptTuning())
FAMILIES = ("llama", "gpt2", "phi3", "qwen3_moe", "bert", "vit", "resnet")
BLOCK = "model.layers.0."


def task_of(family: str) -> Task:
    inputs = tiny_inputs(family, batch=4)
    causal = type(tiny_model(family)).__name__.endswith(("ForCausalLM", "LMHeadModel"))
    batch = {**inputs, "labels": inputs["input_ids"] if causal else torch.arange(4) % 3}
    return Task(name="random", train=[batch], heldout=[batch], retain=[batch])


def prepared(attack: Attack, model: nn.Module, task: Task) -> Prepared:
    generator = torch.Generator().manual_seed(0)
    with torch.random.fork_rng([]):
        return attack.prepare(copy.deepcopy(model), task, original=None, generator=generator)


def trained_names(given: Prepared) -> set[str]:
    moving = {id(p) for group in given.groups for p in group["params"]}
    return {name for name, p in given.model.named_parameters() if id(p) in moving}


def outputs(model: nn.Module, task: Task) -> Tensor:
    with torch.no_grad():
        return model_outputs(model, task.train[0])


def run(attack: Attack, model: nn.Module, task: Task, rate: float = 1e-2, steps: int = 2) -> Run:
    return attack(model, task, Setting(learning_rate=rate), Budget(steps=steps, evaluations=1))


@pytest.fixture(scope="module")
def llama() -> nn.Module:
    return tiny_model("llama")


@pytest.fixture(scope="module")
def task() -> Task:
    return task_of("llama")


def compensated(family: str, config: LockConfig) -> nn.Module:
    return lock_model(tiny_model(family), config).model


# --- freeze patterns


def llama_names(model: nn.Module, part: str) -> set[str]:
    """What the parts of a Llama are called, written down by hand."""
    names = [name for name, _ in model.named_parameters()]
    return {
        "head": {"lm_head.weight"},
        "norms": {n for n in names if "norm" in n},
        "biases": {n for n in names if n.endswith(".bias")},
        "attention": {n for n in names if ".self_attn." in n},
        "mlp": {n for n in names if ".mlp." in n},
        "last-quarter": {n for n in names if n.startswith("model.layers.1.")},
        "first-quarter": {n for n in names if n.startswith(BLOCK)},
        "embeddings": {"model.embed_tokens.weight"},
    }[part]


@pytest.mark.parametrize("part", [p for p in PATTERNS if p != "last-four"])  # two blocks here
def test_what_trains_is_what_the_pattern_says(part: str, llama: nn.Module, task: Task) -> None:
    expected = llama_names(llama, part)
    given = prepared(TrainOnly(part), llama, task)
    assert expected and trained_names(given) == expected
    assert given.relative_cost < 1


def test_a_quarter_of_the_blocks_is_rounded_up(task: Task) -> None:
    model = tiny_model("llama", num_hidden_layers=5)
    names = trained_names(prepared(TrainOnly("last-quarter"), model, task))
    assert {name.split(".")[2] for name in names} == {"3", "4"}


def test_the_last_four_of_five_blocks(task: Task) -> None:
    model = tiny_model("llama", num_hidden_layers=5)
    names = trained_names(prepared(TrainOnly("last-four"), model, task))
    assert {name.split(".")[2] for name in names} == {"1", "2", "3", "4"}
    assert TrainOnly("last-four").applies(tiny_model("llama"))


@pytest.mark.parametrize(
    ("family", "part", "expected"),
    [
        ("gpt2", "head", {"transformer.wte.weight"}),
        ("bert", "head", {"classifier.weight", "classifier.bias"}),
        ("resnet", "head", {"classifier.1.weight", "classifier.1.bias"}),
        ("resnet", "attention", set()),
        ("resnet", "mlp", set()),
        ("resnet", "embeddings", set()),
        ("mistral", "biases", set()),
    ],
)
def test_parts_of_other_families(family: str, part: str, expected: set[str]) -> None:
    model = tiny_model(family)
    attack = TrainOnly(part)
    assert set(attack.trained(model)) == expected
    assert bool(attack.applies(model)) == (not expected)


@pytest.mark.parametrize("family", TINY_FAMILIES)
def test_attention_and_mlp_and_norms_make_the_blocks(family: str) -> None:
    model = tiny_model(family)
    parts = {part: set(TrainOnly(part).trained(model)) for part in PATTERNS}
    if parts["attention"]:
        assert parts["mlp"] and not parts["mlp"] & (parts["attention"] | parts["norms"])
        blocks = parts["first-quarter"] | parts["last-quarter"]  # the models have two blocks
        assert blocks <= parts["mlp"] | parts["attention"] | parts["norms"]
        # DeBERTa's embeddings hold a norm, and its blocks share a table
        assert parts["mlp"] <= blocks


def test_frozen_parameters_do_not_move() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
    batch = (torch.randn(5, 3), torch.zeros(5, dtype=torch.long))
    task = Task(name="t", train=[batch], heldout=[batch])
    attack = TrainOnly("head")
    given = prepared(attack, model, task)
    assert trained_names(given) == {"2.weight", "2.bias"}
    done = run(attack, model, task)
    assert done.trained_parameters == 10 and done.gain > 0
    assert done.relative_cost == pytest.approx(28 / 48)  # see the example of step_work


def test_a_pattern_that_does_not_exist_is_refused() -> None:
    with pytest.raises(ValueError, match="part must be one of head"):
        TrainOnly("tail")


def test_a_tied_head_is_noted() -> None:
    model = tiny_model("gemma")
    note = prepared(TrainOnly("head"), model, task_of("gemma")).notes
    assert "shares its weight" in note[0]
    assert not prepared(TrainOnly("norms"), model, task_of("gemma")).notes


# --- adapters


@pytest.mark.parametrize("attack", ADAPTERS, ids=repr)
@pytest.mark.parametrize("family", FAMILIES)
def test_adapters_leave_the_weights_alone(attack: Attack, family: str) -> None:
    model, task = tiny_model(family), task_of(family)
    if attack.applies(model):
        assert family == "resnet" or isinstance(attack, PromptTuning)
        return
    given = prepared(attack, model, task)
    held = {id(p) for group in given.groups for p in group["params"]}
    kept = [p for p in given.model.parameters() if id(p) not in held]
    before = {p.data_ptr(): p.detach().clone() for p in kept}
    optimizer = torch.optim.SGD(given.groups, lr=0.1)
    model_outputs(given.model, task.train[0]).square().mean().backward()
    optimizer.step()
    assert all(torch.equal(p, before[p.data_ptr()]) for p in kept)
    # a classifier's output layer trains beside the adapters
    head = {"bert": 2, "vit": 2, "resnet": 2}.get(family, 0)
    assert len(kept) == len(list(model.parameters())) - head


@pytest.mark.parametrize("attack", ADAPTERS[:4], ids=repr)
@pytest.mark.parametrize("family", FAMILIES)
def test_adapters_begin_with_the_function_of_the_model(attack: Attack, family: str) -> None:
    model, task = tiny_model(family), task_of(family)
    if not attack.applies(model):
        given = prepared(attack, model, task).model
        torch.testing.assert_close(outputs(given, task), outputs(model, task))


def test_lora_stands_where_it_should(llama: nn.Module, task: Task) -> None:
    attention, everywhere = LoRA().adapted(llama), LoRA(targets="all").adapted(llama)
    assert {path.rpartition(".")[2] for path in attention} == {"q_proj", "v_proj"}
    assert len(attention) == 4 and len(everywhere) == 14 and "lm_head" not in everywhere
    names = trained_names(prepared(LoRA(r=3), llama, task))
    assert len(names) == 8 and all(".lora_" in name for name in names)
    assert LoRA().adapted(tiny_model("gpt2")) == ["transformer.h.0.attn.c_attn", "transformer.h.1.attn.c_attn"]  # fmt: skip


def test_lora_reaches_stacked_experts(task: Task) -> None:
    names = trained_names(prepared(LoRA(targets="all"), tiny_model("qwen3_moe"), task))
    assert any("experts" in name for name in names) and any(".0.mlp." in name for name in names)


def test_lora_on_convolutions() -> None:
    model, task = tiny_model("resnet"), task_of("resnet")
    done = run(LoRA(targets="all"), model, task)
    assert done.gain > 0 and done.added_parameters > 0
    grouped = nn.Sequential(
        nn.Conv2d(6, 6, 3, groups=6), nn.Flatten(), nn.Linear(6, 6), nn.Linear(6, 2)
    )
    assert LoRA(targets="all").adapted(grouped) == ["2"]  # 8 does not divide by 6


def test_lora_on_grouped_convolutions() -> None:
    model = nn.Sequential(
        nn.Conv2d(4, 8, 3, groups=4), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 4, 2)
    )
    batch = (torch.randn(4, 4, 4, 4), torch.tensor([0, 1, 0, 1]))
    task = Task(name="t", train=[batch], heldout=[batch])
    assert LoRA(targets="all").adapted(model) == ["0"]
    assert run(LoRA(targets="all"), model, task).gain > 0


@pytest.mark.parametrize("attack", ADAPTERS[1:3], ids=repr)
def test_adapters_count_where_torch_has_a_fast_path(attack: Attack) -> None:
    layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
    model = nn.Sequential(nn.TransformerEncoder(layer, 2, enable_nested_tensor=False), nn.Flatten(), nn.Linear(24, 3)).eval()  # fmt: skip
    batch = (torch.randn(4, 3, 8), torch.arange(4) % 3)
    given = prepared(attack, model, Task(name="t", train=[batch], heldout=[batch])).model
    with torch.no_grad():
        for name, p in given.named_parameters():
            if "lora_B" in name:
                p.fill_(1.0)
    # Evaluated without gradients, as attacks are, the adapters must still be seen.
    seen = [path for path in LoRA(targets="all").adapted(model) if "linear" in path]
    assert len(seen) == 4
    with torch.no_grad():
        assert not torch.allclose(given(batch[0]), model(batch[0]), atol=1e-2)


def test_names_that_end_alike_are_told_apart() -> None:
    model = nn.Sequential(
        nn.Linear(4, 4), nn.Sequential(nn.Conv1d(6, 6, 1, groups=6), nn.ReLU()), nn.Linear(4, 2)
    )
    assert LoRA(targets="all").adapted(model) == ["0"]
    batch = (torch.randn(3, 6, 4), torch.zeros(3, 6, 2))
    names = trained_names(prepared(LoRA(targets="all"), model, Task(name="t", train=[batch], heldout=[batch])))  # fmt: skip
    assert names == {"0.lora_A.default.weight", "0.lora_B.default.weight", "2.weight", "2.bias"}


def test_lora_learns(llama: nn.Module, task: Task) -> None:
    done = run(LoRA(), llama, task, rate=3e-2, steps=30)
    assert done.best < 0.5 * done.start
    assert done.trained_parameters == done.added_parameters == 2176
    assert 2 / 3 < done.relative_cost < 1


@pytest.mark.parametrize("attack", ADAPTERS, ids=repr)
def test_adapters_learn_in_bfloat16(attack: Attack, llama: nn.Module, task: Task) -> None:
    setting = Setting(learning_rate=1e-2, dtype="bfloat16")
    assert attack(llama, task, setting, Budget(steps=4, evaluations=1)).gain > 0


@pytest.mark.parametrize("attack", ADAPTERS, ids=repr)
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_adapters_beside_inserted_layers(attack: Attack, family: str) -> None:
    task, model = task_of(family), tiny_model(family)
    locked = compensated(family, LockConfig(method="compensated", scale=64.0, k=4))
    control, attacked = run(attack, model, task, steps=4), run(attack, locked, task, steps=4)
    assert compensated_layers(locked)
    assert control.gain > 0
    # The adapter stands beside the pair, so the lock is not met.
    assert attacked.losses == pytest.approx(control.losses, rel=1e-2)


def test_adapters_beside_inserted_convolutions() -> None:
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3, stride=2), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 9, 2)
    )
    batch = (torch.randn(4, 3, 8, 8), torch.tensor([0, 1, 0, 1]))
    task = Task(name="t", train=[batch], heldout=[batch])
    u, s, vh = torch.linalg.svd(model[0].get_parameter("weight").detach().flatten(1), full_matrices=False)  # fmt: skip
    grown = torch.cat([s[:1] * 32, s[1:]])
    locked = copy.deepcopy(model)
    locked[0].weight.data = (u @ grown.diag() @ vh).view(8, 3, 3, 3)
    locked[0] = Compensated(locked[0], u @ (s / grown).diag() @ u.T)
    for attack in (LoRA(targets="all"), LoRA(targets="all", dora=True)):
        control, attacked = run(attack, model, task), run(attack, locked, task)
        assert control.gain > 0
        assert attacked.losses == pytest.approx(control.losses, rel=1e-3)


def test_prompt_tuning_predicts_the_text_alone(llama: nn.Module, task: Task) -> None:
    given = prepared(PromptTuning(5), llama, task)
    assert sum(p.numel() for p in given.groups[0]["params"]) == 5 * 32
    assert outputs(given.model, task).shape == outputs(llama, task).shape
    assert not torch.allclose(outputs(given.model, task), outputs(llama, task))
    assert run(PromptTuning(), llama, task, rate=3e-2, steps=20).gain > 0.05


def test_what_does_not_apply_says_why() -> None:
    mlp = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
    assert "named after queries" in LoRA().applies(mlp)
    assert "named after keys" in IA3().applies(mlp)
    assert "no causal language model" in PromptTuning().applies(mlp)
    assert "besides the output layer" in LoRA(targets="all").applies(nn.Linear(2, 2))
    assert "no linear output layer" in FreshHead().applies(nn.Conv2d(1, 1, 1))


# --- a fresh head


@pytest.mark.parametrize("family", ["llama", "gemma", "gpt2", "bert", "vit", "resnet"])
def test_a_fresh_head_is_new_and_alone(family: str) -> None:
    model, task = tiny_model(family), task_of(family)
    given = prepared(FreshHead(), model, task)
    names = trained_names(given)
    assert {n.rpartition(".")[2] for n in names} <= {"weight", "bias"} and len(names) in (1, 2)
    before = {n: p for n, p in model.named_parameters() if n not in names}
    after = dict(given.model.named_parameters())
    assert all(torch.equal(after[n], p) for n, p in before.items())
    assert outputs(given.model, task).shape == outputs(model, task).shape
    assert not torch.allclose(outputs(given.model, task), outputs(model, task))


def test_a_fresh_head_of_a_tied_model_is_its_own() -> None:
    model, task = tiny_model("gemma"), task_of("gemma")
    given = prepared(FreshHead("all"), model, task)
    assert given.model.lm_head.weight is not given.model.model.embed_tokens.weight  # type: ignore[union-attr]
    assert "no longer shares" in given.notes[0]
    done = run(FreshHead("all"), model, task)
    assert done.added_parameters == 96 * 32
    assert done.trained_parameters == sum(p.numel() for p in model.parameters()) + 96 * 32


def test_a_fresh_head_follows_the_seed(llama: nn.Module, task: Task) -> None:
    settings = Setting(), Budget(steps=1, evaluations=1)
    losses = {seed: FreshHead()(llama, task, *settings, seed=seed).start for seed in (0, 1)}
    assert losses[0] != losses[1]
    assert FreshHead()(llama, task, *settings, seed=0).start == losses[0]


def test_a_locked_head_is_replaced_with_its_inserted_layer() -> None:
    model = nn.Sequential(nn.Linear(3, 4), Compensated(nn.Linear(4, 2), torch.eye(2)))
    batch = (torch.randn(5, 3), torch.zeros(5, dtype=torch.long))
    given = prepared(FreshHead(), model, Task(name="t", train=[batch], heldout=[batch]))
    assert type(given.model[1]) is nn.Linear and given.model[1].weight.shape == (2, 4)  # type: ignore[index]


# --- rebuilding


@pytest.mark.parametrize("family", ["llama", "bert", "vit", "resnet", "qwen3_moe"])
def test_a_twin_has_the_shapes_and_other_weights(family: str) -> None:
    model = tiny_model(family)
    with torch.random.fork_rng([]):
        state = torch.get_rng_state()
        twin = fresh_twin(model, torch.Generator().manual_seed(0))
        assert torch.equal(torch.get_rng_state(), state)
    again = fresh_twin(model, torch.Generator().manual_seed(0))
    other = fresh_twin(model, torch.Generator().manual_seed(1))
    own, others = dict(model.named_parameters()), dict(other.named_parameters())
    assert {n: p.shape for n, p in twin.named_parameters()} == {n: p.shape for n, p in own.items()}
    for (name, p), q in zip(twin.named_parameters(), again.parameters(), strict=True):
        assert torch.equal(p, q)
        assert not torch.equal(p, own[name])
        assert p.ndim < 2 or not bool(p.any()) or not torch.equal(p, others[name])


def test_a_twin_of_a_plain_module_is_reset() -> None:
    model = nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(16, 2)
    )
    model[1].running_mean.fill_(7.0)  # type: ignore[union-attr, operator]
    model[4] = Compensated(model[4], torch.eye(2))
    twin = fresh_twin(model.double(), torch.Generator().manual_seed(0))
    assert type(twin[4]) is nn.Linear  # type: ignore[index]
    assert not bool(twin[1].running_mean.any())  # type: ignore[index]
    assert not torch.equal(twin[0].weight, model[0].weight)  # type: ignore[index]
    assert {p.dtype for p in twin.parameters()} == {torch.float64}


class _Scale(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.factor = nn.Parameter(torch.ones(2))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.factor


def test_without_a_way_to_start_anew_that_is_said() -> None:
    model = nn.Sequential(nn.Linear(2, 2), _Scale())
    for attack in (Scratch(), Distil()):
        assert attack.applies(model) == "no way to draw the weights of 1 (_Scale) anew"
    with pytest.raises(SpecDefError, match="_Scale"):
        fresh_twin(model, torch.Generator())
    assert not Scratch().applies(nn.MultiheadAttention(4, 2))


def test_scratch_starts_without_the_model(task: Task) -> None:
    # Two models with other weights: from scratch they are the same, and what their locks did does not matter.
    a, b = tiny_model("llama", seed=0), compensated("llama", LockConfig(method="compensated", scale=1e4, k=4))  # fmt: skip
    done = run(Scratch(), a, task)
    assert run(FullTraining(), a, task).losses != done.losses
    assert run(Scratch(), b, task).losses == done.losses
    assert done.relative_cost == 1.0 and done.added_parameters == 0


def test_distillation_lowers_the_divergence_from_the_teacher(task: Task) -> None:
    teacher = compensated("llama", LockConfig(method="compensated", scale=1e4, k=4))
    wanted = outputs(teacher, task)

    def divergence(steps: int) -> float:
        student = prepared(Distil(steps=steps, learning_rate=1e-2), teacher, task).model
        assert not compensated_layers(student)
        return float(kl_terms(wanted.flatten(0, 1), outputs(student, task).flatten(0, 1)).mean())

    assert divergence(60) < 0.2 * divergence(1)


def test_a_distilled_regression_comes_near_the_teacher() -> None:
    generator = torch.Generator().manual_seed(0)
    teacher = nn.Sequential(nn.Linear(4, 16), nn.Tanh(), nn.Linear(16, 2))
    batch = (torch.randn(64, 4, generator=generator), torch.zeros(64, 2))
    task = Task(name="t", train=[batch], heldout=[batch], loss=MSELoss())

    def distance(steps: int) -> float:
        student = prepared(Distil(steps=steps, learning_rate=1e-2), teacher, task).model
        return float((outputs(student, task) - outputs(teacher, task)).square().mean())

    assert distance(150) < 0.1 * distance(1)


def test_distillation_in_another_precision_trains_on(llama: nn.Module, task: Task) -> None:
    setting = Setting(learning_rate=1e-2, dtype="bfloat16")
    done = Distil(steps=2)(llama, task, setting, Budget(steps=2, evaluations=1))
    assert done.gain > 0 and "2 steps of distillation" in done.notes[0]
    with pytest.raises(ValueError, match="steps must be at least 1"):
        Distil(steps=0)


def test_the_work_of_everything_is_three_passes_but_for_the_input() -> None:
    model = nn.Sequential(nn.Linear(10, 10, bias=False), nn.Linear(10, 10, bias=False))
    assert step_work(model) == 500
    assert step_work(model, []) == 200
    assert step_work(model, [], inputs=True) == 400
