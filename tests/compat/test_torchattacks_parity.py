"""The drop-in against torchattacks 3.5.1 where that is installed, and against numbers recorded from it."""

from __future__ import annotations

import copy
import inspect
import re

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

import tsrfast.compat.torchattacks as ours
from tsrfast.nets import ConvReLU

ATTACKS = {
    "FGSM": {},
    "BIM": {"steps": 4},
    "PGD": {"steps": 4},
    "PGDL2": {"steps": 4},
    "FFGSM": {},
    "RFGSM": {"steps": 4},
    "EOTPGD": {"steps": 3, "eot_iter": 3},
    "TPGD": {"steps": 4},
    "MIFGSM": {"steps": 4},
    "NIFGSM": {"steps": 4},
    "DIFGSM": {"steps": 4, "decay": 0.5, "diversity_prob": 0.7, "resize_rate": 0.7},
    "TIFGSM": {"steps": 4, "kernel_name": "linear", "len_kernel": 5, "random_start": True, "resize_rate": 0.6},
    "VANILA": {},
    "GN": {},
}
GRADIENT = [n for n in ATTACKS if n not in ("VANILA", "GN", "TPGD")]
EXACT = ("FGSM", "BIM", "VANILA", "GN")
MEAN, STD = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]


@pytest.fixture(scope="module")
def theirs():
    return pytest.importorskip("torchattacks")


def assert_as_original(name, got, want):
    if name == "PGDL2":  # the original adds 1e-10 to the norm of the mean loss's gradient
        torch.testing.assert_close(got, want, rtol=0, atol=1e-7 if got.dtype == torch.float64 else 1e-6)
    elif name in EXACT:
        assert torch.equal(got, want)
    else:  # one rounding a step
        torch.testing.assert_close(got, want, rtol=0, atol=8 * torch.finfo(got.dtype).eps)


# Against the original


@pytest.mark.parametrize("mode", [None, "by_label", "random", "least_likely", "by_function"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("name", ATTACKS)
def test_same_pixels_and_draws(theirs, name, dtype, mode, net, batch, seeded):
    if mode and name not in GRADIENT:
        mode = None
    if name == "TIFGSM" and dtype == torch.float64:
        dtype = torch.float32  # the original's kernel
    (x, y), results = batch(dtype=dtype), []
    for lib in (ours, theirs):
        atk = getattr(lib, name)(net(dtype), **ATTACKS[name])
        if mode:
            set_mode = getattr(atk, f"set_mode_targeted_{mode}")
            set_mode(**({"target_map_function": lambda images, labels: (labels + 1) % 10} if mode == "by_function" else {}))
        results.append(seeded(atk, x, y))
    (got, state), (want, their_state) = results
    assert torch.equal(state, their_state)
    assert_as_original(name, got, want)


@pytest.mark.parametrize("name", GRADIENT)
def test_compiled_networks_differ_where_a_gradient_is_zero_up_to_rounding(theirs, name, seeded):
    model = ConvReLU((12, 8), image=(3, 16, 16), seed=1).eval()
    x = torch.rand(32, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    y = model(x).argmax(1)
    (got, state), (want, their_state) = (seeded(getattr(lib, name)(model), x, y) for lib in (ours, theirs))
    assert torch.equal(state, their_state)
    assert ((got - want).abs() > 1e-4).double().mean() < 0.005
    assert torch.equal(model(got).argmax(1) != y, model(want).argmax(1) != y)


def test_same_names_arguments_and_defaults(theirs, net):
    def parameters(function):
        return [(p.name, p.default, p.kind) for p in inspect.signature(function).parameters.values()]

    for name in ours.__all__:
        assert parameters(getattr(ours, name)) == parameters(getattr(theirs, name))
    for name, method in vars(theirs.attack.Attack).items():
        if name.startswith("_") or not callable(getattr(theirs.attack.Attack, name)):
            continue
        mine = getattr(ours.attack.Attack, name)
        # The original's decorator hides signatures: those of the functions inside it.
        inside = method.__closure__[0].cell_contents if getattr(method, "__name__", "") == "wrapper_func" else None
        assert parameters(mine) == parameters(inside or getattr(theirs.attack.Attack, name)), name
    assert parameters(ours.MultiAttack.save) == parameters(theirs.MultiAttack.save)
    a, b = ours.PGD(net()), theirs.PGD(net())
    assert repr(a) == repr(b)
    assert {k for k in vars(b) if not k.startswith("_")} == {k for k in vars(a) if not k.startswith("_")}
    assert ours.__version__ == theirs.__version__


def test_what_is_missing_is_what_the_original_has_besides(theirs):
    missing = {n for names in ours._MISSING.values() for n in names}
    assert missing | set(ours.__all__) == set(theirs.__all__)


def script_normalised(lib, model, x, y):
    atk = lib.PGD(model, eps=8 / 255, alpha=2 / 225, steps=3, random_start=True)
    atk.set_normalization_used(mean=MEAN, std=STD)
    mean, std = torch.tensor(MEAN).reshape(1, 3, 1, 1), torch.tensor(STD).reshape(1, 3, 1, 1)
    adv = atk((x - mean) / std, y)
    again = atk((x - mean) / std, y)
    return atk.inverse_normalize(adv), again, atk.normalize(x)


def script_targeted(lib, model, x, y):
    atk = lib.PGD(model, eps=8 / 255, alpha=2 / 255, steps=3)
    atk.set_mode_targeted_random()
    random = atk(x, y)
    atk.set_mode_targeted_least_likely(2)
    least, mode = atk(x, y), atk.get_mode()
    atk.set_mode_targeted_by_function(target_map_function=lambda images, labels: (labels + 1) % 10)
    mapped = atk(x, y)
    atk.set_mode_targeted_by_label(quiet=True)
    label = atk(x, (y + 1) % 10)
    atk.set_mode_default()
    return random, least, mapped, label, atk(x, y), mode, str(atk)


def script_written_attributes(lib, model, x, y):
    atk, out = lib.PGD(model, steps=1), []
    for eps in (1 / 255, 4 / 255):
        atk.eps, atk.alpha, atk.steps, atk.random_start = eps, eps / 4, 3, eps < 2 / 255
        out.append(atk(x, y))
    return *out, str(atk)


def script_own_attack(lib, model, x, y):
    class Momentum(lib.attack.Attack):
        def __init__(self, model, eps=0.03):
            super().__init__("Momentum", model)
            self.eps = eps
            self.supported_mode = ["default", "targeted"]

        def forward(self, images, labels):
            images = images.clone().detach().to(self.device)
            labels = labels.clone().detach().to(self.device)
            if self.targeted:
                target_labels = self.get_target_label(images, labels)
            adv_images = images.clone().detach()
            for _ in range(3):
                adv_images.requires_grad = True
                outputs = self.get_logits(adv_images)
                cost = -F.cross_entropy(outputs, target_labels) if self.targeted else F.cross_entropy(outputs, labels)
                grad = torch.autograd.grad(cost, adv_images)[0]
                adv_images = torch.clamp(adv_images.detach() + self.eps / 3 * grad.sign(), 0, 1)
            return adv_images

    atk = Momentum(model)
    plain = atk(x, labels=y)
    atk.set_normalization_used(MEAN, STD)
    atk.set_mode_targeted_least_likely()
    return plain, atk(atk.normalize(x), y), str(atk)


def script_subclass(lib, model, x, y):
    class Blind(lib.BIM):
        def get_logits(self, inputs, labels=None, *args, **kwargs):
            return super().get_logits(inputs * torch.tensor([1.0, 1.0, 0.0]).reshape(1, 3, 1, 1))

    atk = Blind(model, steps=2)
    plain = atk(x, y)
    atk.set_normalization_used(MEAN, STD)
    return plain, atk(atk.normalize(x), y)


def script_multi(lib, model, x, y):
    attacks = [lib.FGSM(model, eps=0.01), lib.BIM(model, eps=0.02, steps=3), lib.BIM(model, eps=0.05)]
    atk = lib.MultiAttack(attacks, verbose=True)
    plain = atk(x, y)
    with pytest.raises(ValueError, match="not supported"):
        atk.set_mode_targeted_by_label()
    some = lib.MultiAttack([lib.BIM(model, eps=1e-3), lib.BIM(model, eps=2e-3)], verbose=True)(x, model(x).argmax(1))
    atk.set_normalization_used(MEAN, STD)
    return plain, some, atk(atk.normalize(x), y), attacks[1].normalization_used is not None


def script_dropout(lib, model, x, y):
    model = nn.Sequential(model, nn.Dropout(0.3), nn.BatchNorm1d(10).double()).train()
    atk = lib.PGD(model, steps=3)
    atk.set_model_training_mode(model_training=True, batchnorm_training=False, dropout_training=True)
    random = atk(x, y)
    atk.set_model_training_mode(model_training=False)
    return random, atk(x, y), model[2].running_mean.clone()


def script_drawing_model(lib, model, x, y):
    class Noisy(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = copy.deepcopy(model).float()

        def forward(self, x):
            return self.inner(x + 0.01 * torch.rand(1))

    return (lib.BIM(Noisy(), steps=3)(x.float(), y),)


def script_nested(lib, model, x, y):
    class Pair(lib.attack.Attack):
        def __init__(self, model):
            super().__init__("Pair", model)
            self.supported_mode = ["default", "targeted"]
            self.parts = {"one": [lib.FGSM(model)], "two": lib.BIM(model, steps=2)}

        def forward(self, images, labels):
            return self.parts["two"](self.parts["one"][0](images, labels), labels)

    atk = Pair(model)
    plain = atk(x, y)
    atk.set_mode_targeted_by_label(quiet=True)
    atk.set_normalization_used(MEAN, STD)
    atk.set_device("cpu")
    return plain, atk(atk.normalize(x), y), atk.parts["two"].get_mode()


SCRIPTS = [v for k, v in list(globals().items()) if k.startswith("script_")]


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda s: s.__name__)
def test_users_scripts_run_unchanged(theirs, script, capsys, net, batch, seeded):
    x, y = batch()
    results, said = [], []
    for lib in (ours, theirs):
        results.append(seeded(script, lib, net(), x, y))
        said.append(capsys.readouterr().out)
    (got, state), (want, their_state) = results
    for mine, other in zip(got, want, strict=True):
        if isinstance(mine, torch.Tensor):
            assert mine.dtype == other.dtype
            torch.testing.assert_close(mine, other, rtol=0, atol=1e-13)
        else:
            assert mine == other
    assert torch.equal(state, their_state)
    if script is not script_nested:  # the original tells a nested attack twice
        assert said[0] == said[1]


@pytest.mark.parametrize("save_type", ["float", "int"])
@pytest.mark.parametrize("normalised", [False, True])
@pytest.mark.parametrize("multi", [False, True])
def test_save_and_load(theirs, tmp_path, capsys, save_type, normalised, multi, net, batch):
    model, (x, y) = net(torch.float32), batch(12, torch.float32)
    norm = {"mean": MEAN, "std": STD}
    results, said = [], []
    for lib in (ours, theirs):
        atk = lib.BIM(model, eps=0.05, steps=3)
        if multi:
            atk = lib.MultiAttack([lib.FGSM(model, eps=0.02), atk])
        if normalised:
            atk.set_normalization_used(**norm)
        loader = DataLoader(TensorDataset(atk.normalize(x) if normalised else x, y), batch_size=5)
        more = {} if multi else {"save_clean_inputs": True, "save_type": save_type}
        results.append(atk.save(loader, tmp_path / lib.__name__, return_verbose=True, save_predictions=True, **more))
        said.append(re.sub(r"[0-9.]+ it/s", "", capsys.readouterr().out))
    for mine, other in zip(results[0][:-1], results[1][:-1], strict=True):
        assert mine == pytest.approx(other)
    assert said[0] == said[1]
    options = {
        "load_predictions": True,
        "load_clean_inputs": not multi,
        "normalize": norm if normalised else None,
        "batch_size": 7,
    }
    for a, b in zip(
        ours.PGD.load(tmp_path / ours.__name__, **options), theirs.PGD.load(tmp_path / "torchattacks", **options), strict=True
    ):
        assert len(a) == len(b) == 4 - multi
        for mine, other in zip(a, b, strict=True):
            assert torch.equal(mine, other)
    for a, b in zip(
        ours.PGD.load(tmp_path / "torchattacks"), theirs.PGD.load(tmp_path / ours.__name__), strict=True
    ):  # each other's files
        assert all(map(torch.equal, a, b))


# As in the original's README and demo notebooks; the import line alone is changed.
DEMOS = {
    "white box": """
import torchattacks
atk = torchattacks.PGD(model, eps=8/255, alpha=2/225, steps=10, random_start=True)
atk.set_normalization_used(mean=[0.4914, 0.4822, 0.4465], std=[0.2023, 0.1994, 0.2010])
print(atk)
adv_images = atk(atk.normalize(images), labels)
""",
    "targeted": """
import torchattacks
atk = torchattacks.PGD(model, eps=8/255, alpha=2/255, steps=10)
atk.set_mode_targeted_by_label(quiet=True)
adv_images = atk(images, (labels + 1) % 10)
atk.set_mode_targeted_by_function(target_map_function=lambda images, labels: (labels + 2) % 10)
other = atk(images, labels)
atk.set_mode_targeted_random()
atk.set_mode_targeted_least_likely(1)
adv_images = adv_images + atk(images, labels) + other
""",
    "multi": """
import torchattacks
atk1 = torchattacks.FGSM(model, eps=2/255)
atk2 = torchattacks.PGD(model, eps=8/255, alpha=2/255, steps=40, random_start=True)
atk3 = torchattacks.APGD(model, eps=8/255)
atk = torchattacks.MultiAttack([atk1, atk2, atk3])
adv_images = atk(images, labels)
""",
    "save": """
import torchattacks
from torch.utils.data import DataLoader, TensorDataset
data_loader = DataLoader(TensorDataset(images, labels), batch_size=4)
atk = torchattacks.MIFGSM(model, eps=8/255, steps=5)
atk.save(data_loader, save_path=path, verbose=False)
adv_loader = atk.load(load_path=path)
adv_images, labels = next(iter(adv_loader))
""",
    "own attack": """
import torch
import torchattacks
from torchattacks.attack import Attack
class Shift(Attack):
    def __init__(self, model, eps=0.1):
        super().__init__("Shift", model)
        self.eps = eps
        self.supported_mode = ["default"]
    def forward(self, images, labels):
        return torch.clamp(images.to(self.device) + self.eps * (self.get_logits(images).argmax(1) == labels).view(-1, 1, 1, 1), 0, 1)
atk = torchattacks.MultiAttack([Shift(model), torchattacks.FFGSM(model, eps=8/255)])
adv_images = atk(images, labels)
""",
}


@pytest.mark.parametrize("name", DEMOS)
def test_demos_run_with_another_import_line(name, net, batch, tmp_path, capsys):
    """What the demos print and return; where the original is installed, as it does."""
    ran = []
    for lib in ("tsrfast.compat.torchattacks", "torchattacks"):
        if lib == "torchattacks":
            pytest.importorskip(lib)
        script = (
            DEMOS[name]
            .replace("import torchattacks", f"import {lib} as torchattacks")
            .replace("from torchattacks.", f"from {lib}.")
        )
        (images, labels), path = batch(dtype=torch.float32), str(tmp_path / lib)
        given = {"model": net(torch.float32), "images": images, "labels": labels, "path": path}
        with torch.random.fork_rng():
            torch.manual_seed(3)
            exec(script, given)
        got = given["adv_images"].detach()
        assert got.shape == images.shape
        ran.append((got, capsys.readouterr().out))
    torch.testing.assert_close(ran[0][0], ran[1][0], rtol=0, atol=2e-6)
    assert ran[0][1] == ran[1][1]


# Against numbers recorded from the original

# torchattacks 3.5.1, torch 2.13, torch.manual_seed(11), on tiny()
RECORDED = [
    ("FGSM", {"eps": 0.05}, [0.05, 0.35, 0.65, 0.93, 0.0, 0.55, 0.35, 0.65]),
    ("BIM", {"steps": 3},
     [0.076470588, 0.376470588, 0.623529412, 0.956470588, 0.0, 0.523529412, 0.323529412, 0.676470588]),
    ("PGD", {"eps": 0.3, "alpha": 0.05, "steps": 3},
     [0.0, 0.7, 0.852928503, 0.85, 0.0, 0.442821377, 0.255060738, 0.4]),
    ("PGDL2", {"eps": 0.5, "alpha": 0.2, "steps": 3},
     [0.008264947, 0.75940885, 0.64362926, 0.647574901, 0.0, 0.824879519, 0.427675942, 0.417107726]),
    ("FFGSM", {"eps": 0.3, "alpha": 0.2}, [0.092013576, 0.157001368, 0.9, 1.0, 0.0, 0.671139599, 0.258434888, 0.4]),
    ("RFGSM", {"eps": 0.3, "alpha": 0.05, "steps": 3}, [0.0, 0.6, 0.7, 0.78, 0.0, 0.6, 0.5, 0.6]),
    ("TPGD", {"eps": 0.3, "alpha": 0.05, "steps": 3},
     [0.0, 0.551945929, 0.749300458, 0.828697703, 0.169486738, 0.34973038, 0.150246185, 0.850483925]),
    ("MIFGSM", {"eps": 0.3, "alpha": 0.05, "steps": 4}, [0.0, 0.2, 0.8, 0.78, 0.0, 0.7, 0.5, 0.5]),
    ("NIFGSM", {"eps": 0.3, "alpha": 0.05, "steps": 4}, [0.0, 0.2, 0.8, 0.78, 0.0, 0.7, 0.5, 0.5]),
    ("DIFGSM", {"eps": 0.3, "alpha": 0.05, "steps": 4, "resize_rate": 0.5, "decay": 0.5}, [0.0, 0.2, 0.6, 0.78, 0.0, 0.5, 0.2, 0.5]),
    ("GN", {"std": 0.2}, [0.24752589, 0.78918583, 0.460091678, 0.719540524, 0.0, 0.446076087, 0.349236934, 0.796785059]),
]  # fmt: skip
TARGETS = {"random": [2, 0], "least_likely": [1, 1], "by_label": [0, 3]}  # torch.manual_seed(12)


@pytest.mark.parametrize(("name", "options", "want"), RECORDED)
def test_recorded_images(name, options, want, tiny):
    model, x, y = tiny()
    with torch.random.fork_rng():
        torch.manual_seed(11)
        got = getattr(ours, name)(model, **options)(x, y)
    torch.testing.assert_close(got.flatten(), torch.tensor(want, dtype=torch.float64), rtol=0, atol=1e-8)


@pytest.mark.parametrize("mode", TARGETS)
def test_recorded_targets(mode, tiny):
    model, x, y = tiny()
    atk = ours.BIM(model)
    getattr(atk, f"set_mode_targeted_{mode}")(quiet=True)
    with torch.random.fork_rng():
        torch.manual_seed(12)
        assert atk.get_target_label(x, y).tolist() == TARGETS[mode]
