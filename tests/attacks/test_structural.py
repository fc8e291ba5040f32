"""Structural attacks: what keeps the function keeps it, what undoes a lock undoes it, what does not apply says why."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor, nn

from specdef.attacks.attack import Attack, Prepared
from specdef.attacks.full import FullTraining
from specdef.attacks.run import Run
from specdef.attacks.structural import (
    STRUCTURAL,
    BaseDiff,
    ClipSpectrum,
    ColumnRates,
    Factor,
    FoldNorms,
    FreezeInserted,
    Inject,
    KnownScale,
    Merge,
    Migrate,
    Quantise,
    Rebalance,
    RebalanceClip,
)
from specdef.attacks.structural.edits import linear_modules, matrix_of, pointwise
from specdef.attacks.structural.rebalance import rebalance
from specdef.attacks.structural.sites import has_room, rescale, symmetric_sites
from specdef.attacks.task import Budget, Setting, Task
from specdef.curvature.losses import model_outputs
from specdef.errors import SpecDefError
from specdef.lock.compensated import compensated_layers
from specdef.lock.config import LockConfig
from specdef.lock.in_memory import LockedModel, lock_model, unique_tensors
from specdef.lock.quantization import round_to_grid
from specdef.models.tiny import tiny_inputs, tiny_model
from specdef.spectral.topk import topk_svd

torch.set_num_threads(1)

FAMILIES = ("llama", "gpt2", "vit", "resnet")
RATES = (1e-9, 1e-8, 1e-7, 1e-6, 3e-6, 1e-5, 1e-4, 1e-3, 3e-3, 1e-2)
"""A decade apart, finer where the locks below are stable."""

LOW = tuple(10.0**e for e in range(-18, -9))
"""Where the default lock is stable: 2^-48 times the rates above."""

COMPENSATED = LockConfig(method="compensated", scale=1e4, k=4, num_layers=2)
ABSORBED = LockConfig()


def task_of(family: str) -> Task:
    """Random inputs and labels: enough where only the function counts."""
    inputs = tiny_inputs(family, batch=4)
    labels = torch.arange(4) if "pixel_values" in inputs else inputs["input_ids"]
    batch = {**inputs, "labels": labels}
    return Task(name="random", train=[batch], heldout=[batch])


def mlp() -> nn.Sequential:
    with torch.random.fork_rng([]):
        torch.manual_seed(0)
        layers = (nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 4))
        return nn.Sequential(*layers).eval()


def mlp_task() -> Task:
    generator = torch.Generator().manual_seed(1)
    teacher = torch.randn(4, 16, generator=generator)
    inputs = [torch.randn(64, 16, generator=generator) for _ in range(6)]
    batches = [(x, (x @ teacher.T).argmax(1)) for x in inputs]
    return Task(name="linear teacher", train=batches[:4], heldout=batches[4:])


def permutation_task() -> Task:
    """The next token is a fixed permutation of this one."""
    generator = torch.Generator().manual_seed(0)
    permutation = torch.randperm(96, generator=generator)
    batches = []
    for _ in range(6):
        tokens = [torch.randint(3, 96, (16, 1), generator=generator)]
        for _ in range(11):
            tokens.append(permutation[tokens[-1]])
        ids = torch.cat(tokens, 1)
        batches.append({"input_ids": ids, "labels": ids})
    return Task(name="permutation", train=batches[:4], heldout=batches[4:])


def prepared(
    attack: Attack, model: nn.Module, task: Task, original: nn.Module | None = None
) -> Prepared:
    return attack.prepare(
        copy.deepcopy(model), task, original=original, generator=torch.Generator().manual_seed(0)
    )


def outputs(model: nn.Module, task: Task) -> Tensor:
    with torch.no_grad():
        return model_outputs(model, task.train[0])


def best(attack: Attack, model: nn.Module, task: Task, rates: Sequence[float] = RATES) -> Run:
    budget = Budget(steps=16, evaluations=4)
    runs = [attack(model, task, Setting(learning_rate=rate), budget) for rate in rates]
    return min(runs, key=lambda run: run.best)


@pytest.fixture(scope="module")
def llama() -> nn.Module:
    return tiny_model("llama")


@pytest.fixture(scope="module")
def permutation() -> Task:
    return permutation_task()


@pytest.fixture(scope="module")
def control(llama: nn.Module, permutation: Task) -> Run:
    return best(FullTraining(), llama, permutation)


def locked(model: nn.Module, config: LockConfig) -> LockedModel:
    return lock_model(copy.deepcopy(model), config)


@pytest.fixture(scope="module")
def absorbed(llama: nn.Module) -> LockedModel:
    return locked(llama, ABSORBED)


# --- the function


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    "attack", [Rebalance(), ColumnRates(), Inject(), Inject(freeze=False), KnownScale()], ids=repr
)
def test_powers_of_two_and_identities_keep_every_bit(attack: Attack, family: str) -> None:
    model, task = tiny_model(family), task_of(family)
    assert torch.equal(outputs(prepared(attack, model, task).model, task), outputs(model, task))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("attack", [FoldNorms(), Migrate(), Factor(), Factor(3)], ids=repr)
def test_others_keep_the_function_to_rounding(attack: Attack, family: str) -> None:
    model, task = tiny_model(family, dtype=torch.float32), task_of(family)
    edited = prepared(attack, model, task).model
    before, after = outputs(model, task), outputs(edited, task)
    assert float((after - before).norm()) < 2e-6 * float(before.norm())
    assert not attack.applies(model)


@pytest.mark.parametrize("family", ["gemma", "phi3", "gpt_neox", "mixtral", "gpt_oss", "bert"])
def test_other_families_keep_their_function_too(family: str) -> None:
    model, task = tiny_model(family), task_of("llama")
    before = outputs(model, task)
    for attack in (Rebalance(), ColumnRates(), Inject()):
        assert torch.equal(outputs(prepared(attack, model, task).model, task), before), attack
    for attack in (FoldNorms(), Migrate(), Factor()):
        after = outputs(prepared(attack, model, task).model, task)
        assert float((after - before).norm()) < 2e-6 * float(before.norm()), attack


@pytest.mark.parametrize("family", FAMILIES)
def test_a_compensated_pair_is_merged_frozen_and_expanded(family: str) -> None:
    model, task = tiny_model(family), task_of(family)
    lock_model(model, LockConfig(method="compensated", scale=100.0, k=2, num_layers=2))
    pairs = compensated_layers(model)
    assert pairs
    before = outputs(model, task)
    for attack in (Merge(), FreezeInserted(), Factor()):
        edited = prepared(attack, model, task)
        assert float((outputs(edited.model, task) - before).norm()) < 1e-4 * float(before.norm())
        assert not compensated_layers(edited.model)
        assert not attack.applies(model)
    merged, frozen = (prepared(a, model, task) for a in (Merge(), FreezeInserted()))
    size = sum(p.numel() for p in tiny_model(family).parameters())
    assert sum(p.numel() for p in merged.model.parameters()) == size
    assert merged.relative_cost < 1
    # all that trains are the original's own numbers
    assert sum(p.numel() for p in frozen.groups[0]["params"]) == size
    assert len(compensated_layers(model)) == len(pairs), "the model that was given stays as it is"


def test_merging_gives_the_original_weights_back(llama: nn.Module) -> None:
    edited = prepared(Merge(), locked(llama, COMPENSATED).model, task_of("llama")).model
    weight = edited.get_parameter("model.layers.0.mlp.up_proj.0.weight")
    original = llama.get_parameter("model.layers.0.mlp.up_proj.weight")
    torch.testing.assert_close(weight, original, rtol=0, atol=2e-3)


class Pair(nn.Module):
    """Somebody else's inserted layer."""

    def __init__(self, layer: nn.Linear, inserted: nn.Linear, between: Callable[[Tensor], Tensor]) -> None:  # fmt: skip
        super().__init__()
        self.layer, self.inserted, self.between = layer, inserted, between

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.inserted(self.between(self.layer(x)))
        return out


def test_foreign_pairs_are_found_by_what_they_compute() -> None:
    task = mlp_task()
    with torch.random.fork_rng([]):
        torch.manual_seed(3)
        linear = Pair(nn.Linear(16, 8), nn.Linear(8, 8), lambda x: x)
        bent = Pair(nn.Linear(8, 8), nn.Linear(8, 8), torch.relu)
        before_it = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 4, bias=False))
        model = nn.Sequential(linear, bent, before_it, nn.ReLU(), nn.Linear(4, 4)).eval()
    before = outputs(model, task)
    edited = prepared(Merge(), model, task)
    torch.testing.assert_close(outputs(edited.model, task), before)
    kept = [path for path, m in edited.model.named_modules() if isinstance(m, nn.Linear)]
    assert kept == ["0.layer", "1.layer", "1.inserted", "2.1", "4"]
    frozen = prepared(FreezeInserted(), model, task)
    trained = {id(p) for p in frozen.groups[0]["params"]}
    held = [name for name, p in frozen.model.named_parameters() if id(p) not in trained]
    assert held == ["0.inserted.weight", "2.0.weight"]


def test_a_point_by_point_convolution_merges_and_one_with_a_stride_does_not() -> None:
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(4, 3, 8, 8, generator=generator)
    task = Task(name="images", train=[(images, torch.arange(4))], heldout=[(images, torch.arange(4))])  # fmt: skip
    for stride, merges in ((1, True), (2, False)):
        layers = (nn.Conv2d(3, 6, 3, padding=1), nn.Conv2d(6, 6, 1, stride=stride), nn.Flatten())
        model = nn.Sequential(*layers).eval()
        edited = prepared(Merge(), model, task).model
        torch.testing.assert_close(outputs(edited, task), outputs(model, task))
        assert isinstance(edited[1], nn.Identity) == merges
        assert bool(Merge().applies(model)) != merges


# --- what falls to what


def test_the_absorbed_lock_falls_to_rebalancing_and_column_rates(
    llama: nn.Module, absorbed: LockedModel, permutation: Task, control: Run
) -> None:
    tuned = best(FullTraining(), absorbed.model, permutation, (*LOW, 1e-8, 1e-4, 1e-2))
    assert 0.01 * control.gain < tuned.gain < 0.1 * control.gain  # the rates reach where it learns
    for attack in (Rebalance(), ColumnRates(), RebalanceClip()):
        assert not attack.applies(absorbed.model)
        assert best(attack, absorbed.model, permutation, (3e-3, 1e-2)).gain > 0.9 * control.gain, (
            attack
        )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("config", [ABSORBED, LockConfig(sides="readers"), LockConfig.preset("convex")], ids=["max", "readers", "convex"])  # fmt: skip
@pytest.mark.parametrize("family", [*FAMILIES, "mixtral"])
def test_rebalancing_finds_the_scales_without_the_key(
    family: str, config: LockConfig, dtype: torch.dtype
) -> None:
    original = tiny_model(family, dtype=dtype)
    bound = locked(original, config)
    free = copy.deepcopy(original)
    for model in (free, bound.model):
        rebalance(model)
    same = total = 0
    for name in bound.key.scalings:
        # One channel less on its side of the median moves that a little: some exponents are rounded the other way.
        ratio = unique_tensors(bound.model)[name] / unique_tensors(free)[name]
        assert bool(((ratio == 0.5) | (ratio == 1) | (ratio == 2)).all()), name
        same, total = same + int((ratio == 1).sum()), total + ratio.numel()
    assert same > 0.95 * total


@pytest.mark.parametrize("config", [ABSORBED, LockConfig.preset("convex")], ids=["max", "convex"])
@pytest.mark.parametrize("family", FAMILIES)
def test_units_of_rows_and_columns_undo_the_scales(family: str, config: LockConfig) -> None:
    """What is trained lies within a factor of two of what would be, had the model not been locked: biases and gains too."""
    original, task = tiny_model(family), task_of(family)
    free, bound = (prepared(ColumnRates(), m, task).model for m in (original, locked(original, config).model))  # fmt: skip
    assert torch.equal(outputs(free, task), outputs(bound, task))
    values = trained(free)
    for name, locked_values in trained(bound).items():
        octaves = (locked_values / values[name]).log2()[values[name] != 0]
        assert bool((octaves.abs() <= 1).all()), name


def trained(model: nn.Module) -> dict[str, Tensor]:
    """Return what an optimiser sees, by the names the tensors had before they got other units."""
    return {
        name.replace("parametrizations.", "").replace(".original", ""): value.detach()
        for name, value in model.named_parameters()
    }


def test_the_key_gives_the_run_of_the_unlocked_model(
    llama: nn.Module, absorbed: LockedModel, permutation: Task, control: Run
) -> None:
    attack = KnownScale(absorbed.key)
    assert not attack.applies(absorbed.model)
    assert best(attack, absorbed.model, permutation, (1e-2,)).losses == pytest.approx(control.losses, rel=1e-3)  # fmt: skip
    assert "not locked" in attack.applies(llama)
    assert prepared(attack, llama, permutation).notes == ("0 tensors got other units",)


def test_the_compensated_lock_falls_to_merging_and_freezing(
    llama: nn.Module, permutation: Task, control: Run
) -> None:
    model = locked(llama, COMPENSATED).model
    assert best(FullTraining(), model, permutation).gain < 0.6 * control.gain
    for attack in (Merge(), FreezeInserted(), Inject(), Factor(), Factor(3)):
        assert best(attack, model, permutation, (1e-3, 1e-2)).gain > 0.9 * control.gain, attack


def test_the_scaled_lock_falls_to_clipping(
    llama: nn.Module, permutation: Task, control: Run
) -> None:
    model = locked(llama, LockConfig(method="scaled", scale=1e3, k=4, num_layers=2)).model
    reach = control.start - 0.9 * control.gain
    assert best(FullTraining(), model, permutation).best > control.start - 0.5 * control.gain
    run = best(ClipSpectrum(), model, permutation, (1e-3, 1e-2))
    assert run.best < reach


def test_uniform_scaling_falls_to_a_sweep() -> None:
    task, model, scale = mlp_task(), mlp(), 100.0
    layers: list[nn.Module] = []
    for layer in model:
        if isinstance(layer, nn.Linear):
            wide = layer.weight.detach() * scale
            inverse = torch.eye(layer.out_features) / scale
            layers += [pointwise(wide, None, layer), pointwise(inverse, layer.bias.detach(), layer)]
        else:
            layers.append(layer)
    rates = (1e-5, 1e-4, 3e-4, 1e-3, 2e-3, 1e-2)
    free = best(FullTraining(), model, task, rates)
    assert best(FullTraining(), nn.Sequential(*layers), task, rates).gain > 0.8 * free.gain


def test_a_locked_perceptron_is_rebalanced_by_the_order_of_its_layers() -> None:
    task, model = mlp_task(), mlp()
    bound = copy.deepcopy(model)
    sites = symmetric_sites(bound)
    assert [(s.name, s.kind, s.size) for s in sites] == [("0", "relu", 32), ("2", "relu", 32)]
    for site, exponent in zip(sites, (30, 8), strict=True):
        factors = torch.ones(32, dtype=torch.float64)
        factors[3] = 2.0**exponent
        rescale(unique_tensors(bound), site, factors)
    assert torch.equal(outputs(bound, task), outputs(model, task))
    free = best(FullTraining(), model, task)
    assert best(FullTraining(), bound, task).gain < 0.5 * free.gain
    for attack in (Rebalance(), ColumnRates()):
        assert torch.equal(outputs(prepared(attack, bound, task).model, task), outputs(model, task))
        assert best(attack, bound, task, (3e-3, 1e-2)).gain > 0.8 * free.gain, attack


def test_migration_undoes_the_scales_whatever_they_are(
    llama: nn.Module, absorbed: LockedModel
) -> None:
    task = task_of("llama")
    free, bound = (unique_tensors(prepared(Migrate(), m, task).model) for m in (llama, absorbed.model))  # fmt: skip
    for name in absorbed.key.scalings:
        torch.testing.assert_close(free[name], bound[name], rtol=1e-4, atol=1e-5)


def test_folding_leaves_gains_of_one() -> None:
    for family in ("llama", "gemma", "gpt2", "resnet"):
        model = prepared(FoldNorms(), tiny_model(family), task_of("llama")).model
        tensors = unique_tensors(model)
        for site in symmetric_sites(model):
            gain = tensors[site.producers[0].tensor]
            if site.kind == "norm" or site.kind == "batchnorm":
                torch.testing.assert_close(gain.abs(), torch.ones_like(gain))
            elif site.kind == "offset-norm":
                torch.testing.assert_close(gain, torch.zeros_like(gain), atol=1e-6, rtol=0)


# --- single edits


def test_clipping_leaves_the_bulk_and_flattens_the_top() -> None:
    model, task = mlp(), mlp_task()
    before = {path: matrix_of(m).clone() for path, m in linear_modules(model).items()}
    edited = prepared(ClipSpectrum(k=3), model, task).model
    for path, module in linear_modules(edited).items():
        old = torch.linalg.svdvals(before[path])
        k = min(3, max(1, len(old) // 4))
        torch.testing.assert_close(torch.linalg.svdvals(matrix_of(module)), old.clamp_max(float(old[k])))  # fmt: skip


def test_clipping_leaves_a_matrix_without_a_bulk_alone() -> None:
    model = nn.Sequential(nn.Linear(8, 8))
    weight = torch.outer(torch.arange(8.0), torch.ones(8))
    with torch.no_grad():
        model[0].weight.copy_(weight)
    assert torch.equal(prepared(ClipSpectrum(), model, mlp_task()).model[0].weight.detach(), weight)


def test_factors_share_the_singular_values() -> None:
    model = mlp()
    for factors in (2, 3):
        edited = prepared(Factor(factors), model, mlp_task()).model
        for layer, chain in zip(model[::2], edited[::2], strict=True):
            top = float(topk_svd(matrix_of(layer), 1).S[0])
            assert len(chain) == factors
            for factor in chain:
                size = float(torch.linalg.matrix_norm(matrix_of(factor), 2))
                assert size == pytest.approx(top ** (1 / factors), rel=1e-4)
    with pytest.raises(ValueError, match="at least 2"):
        Factor(1)


def test_rounding_is_to_one_step_per_row_or_group() -> None:
    matrix = torch.randn(4, 10, generator=torch.Generator().manual_seed(0))
    for bits, group in ((8, None), (4, None), (4, 3)):
        rounded = round_to_grid(matrix, bits, group)
        for old, new in zip(matrix.split(group or 10, 1), rounded.split(group or 10, 1), strict=True):  # fmt: skip
            top = old.abs().amax(1, keepdim=True)
            step = top / (2 ** (bits - 1) - 1)
            assert bool(((new - old).abs() <= 0.5001 * step).all())
            torch.testing.assert_close((new / step).round() * step, new)
            torch.testing.assert_close(new.abs().amax(1, keepdim=True), top)
    with pytest.raises(ValueError, match="at least"):
        Quantise(1)


def test_rounding_goes_along_the_outputs_also_where_weights_are_stored_transposed() -> None:
    model = tiny_model("gpt2")
    edited = prepared(Quantise(4), model, task_of("gpt2")).model
    name = "transformer.h.0.mlp.c_fc.weight"
    assert torch.equal(edited.get_parameter(name).T, round_to_grid(model.get_parameter(name).detach().T, 4))  # fmt: skip


def test_rounding_damages_a_locked_model_and_not_the_original(
    llama: nn.Module, absorbed: LockedModel
) -> None:
    task = task_of("llama")
    errors = []
    for model in (llama, absorbed.model):
        before = outputs(model, task)
        after = outputs(prepared(Quantise(8), model, task).model, task)
        errors.append(float((after - before).norm() / before.norm()))
    assert errors[0] < 0.03 and errors[1] > 5 * errors[0]


def test_injection_adds_and_trains_what_it_says(llama: nn.Module, permutation: Task) -> None:
    run = Inject()(llama, permutation, Setting(), Budget(steps=1))
    whole = Inject(freeze=False)(llama, permutation, Setting(), Budget(steps=1))
    size = sum(p.numel() for p in llama.parameters())
    assert run.added_parameters == run.trained_parameters == whole.added_parameters > 0
    assert whole.trained_parameters == size + whole.added_parameters
    assert whole.relative_cost > run.relative_cost
    assert {run.attack, whole.attack} == {"layer-injection", "layer-injection-all"}


def test_costs_leave_out_tables_that_are_looked_up() -> None:
    layers = nn.Embedding(1000, 4), nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4)
    model, task = nn.Sequential(*layers), mlp_task()
    assert prepared(Inject(freeze=False), model, task).relative_cost == 2
    # Products with 4 x 4 matrices: 1 + 2 + 2 + 3 where the identities train, 3 + 3 without them.
    assert prepared(Inject(), model, task).relative_cost == pytest.approx(8 / 6)
    assert prepared(Factor(), nn.Sequential(layers[0], layers[1]), task).relative_cost == 2


def test_no_identity_is_put_inside_a_foreign_pair() -> None:
    task, model, layers = mlp_task(), mlp(), list[nn.Module]()
    for layer in model:
        layers.append(layer)
        if isinstance(layer, nn.Linear):
            left, values, right = torch.linalg.svd(layer.weight.detach(), full_matrices=False)
            scales = torch.ones_like(values)
            scales[:2] = 1e4
            layers[-1] = pointwise(left * scales * values @ right, None, layer)
            # off the columns of U the inverse is the identity
            back = torch.eye(len(left)) + (left / scales - left) @ left.T
            layers.append(pointwise(back, layer.bias.detach(), layer))
    bound = nn.Sequential(*layers)
    torch.testing.assert_close(outputs(bound, task), outputs(model, task), rtol=1e-2, atol=1e-2)
    paths = [name for name, _ in prepared(Inject(), bound, task).model.named_parameters()]
    assert "0.weight" in paths and "1.1.weight" in paths
    rates = (1e-3, 3e-3, 1e-2)
    assert best(Inject(), bound, task, rates).gain > 0.9 * best(Inject(), model, task, rates).gain


def test_no_identity_is_put_behind_a_vocabulary_head() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 100))
    assert prepared(Inject(), model, mlp_task()).notes == ("injected 1 identity layers",)


def test_the_original_is_taken_where_it_is_public(llama: nn.Module, absorbed: LockedModel) -> None:
    task = task_of("llama")
    result = prepared(BaseDiff(), absorbed.model, task, llama)
    assert torch.equal(outputs(result.model, task), outputs(llama, task))
    assert f"{len(absorbed.key.scalings)} of " in result.notes[0]
    with pytest.raises(SpecDefError, match="original"):
        prepared(BaseDiff(), absorbed.model, task)


def test_what_has_no_room_is_not_rescaled() -> None:
    model = mlp()
    site = symmetric_sites(model)[0]
    exponents = torch.zeros(site.size)
    exponents[0], exponents[1] = 140, -3
    room = has_room(unique_tensors(model), site, exponents)
    assert not room[0] and room[1:].all()


# --- where they do not apply


def test_what_does_not_apply_says_why(llama: nn.Module, absorbed: LockedModel) -> None:
    for attack in (Merge(), FreezeInserted()):
        for family in ("llama", "gpt2", "phi3", "resnet"):
            assert "no inserted layer" in attack.applies(tiny_model(family))
    assert "merge" in ClipSpectrum().applies(locked(llama, COMPENSATED).model)
    smooth = nn.Sequential(nn.Linear(4, 8), nn.GELU(), nn.Linear(8, 2))
    for attack in (Rebalance(), FoldNorms(), Migrate()):
        assert "no symmetric site" in attack.applies(smooth)
    assert "kind" in FoldNorms().applies(tiny_model("bert"))
    assert "no key" in KnownScale().applies(llama)
    key = locked(llama, COMPENSATED).key
    assert "compensated" in KnownScale(key).applies(absorbed.model)
    assert "no plain linear" in Inject().applies(nn.Embedding(4, 4))
    for attack in (Quantise(), ClipSpectrum()):
        assert attack.applies(nn.Embedding(4, 4)) == "no weight matrix"


def test_asking_changes_nothing(llama: nn.Module) -> None:
    model = copy.deepcopy(llama)
    model.requires_grad_(False)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    for attack in STRUCTURAL:
        attack.applies(model)
    assert not any(p.requires_grad for p in model.parameters())
    assert all(torch.equal(before[name], t) for name, t in model.state_dict().items())


@pytest.mark.parametrize("attack", STRUCTURAL, ids=lambda attack: attack.name)
def test_every_attack_learns_on_an_unlocked_model(
    attack: Attack, llama: nn.Module, permutation: Task, control: Run
) -> None:
    run = best_with_original(attack, llama, permutation)
    assert run.gain > 0.25 * control.gain and run.status == "finished"


def best_with_original(attack: Attack, model: nn.Module, task: Task) -> Run:
    budget = Budget(steps=16, evaluations=2)
    return attack(model, task, Setting(learning_rate=1e-2), budget, original=model)


def test_names_are_unique_and_tiers_right() -> None:
    names = [attack.name for attack in STRUCTURAL]
    assert len(set(names)) == len(names)
    tiers = {attack.name: attack.tier for attack in STRUCTURAL}
    assert tiers.pop("freeze-inserted") == 3 and set(tiers.values()) == {5}
    assert all(attack.source and attack.summary for attack in STRUCTURAL)
