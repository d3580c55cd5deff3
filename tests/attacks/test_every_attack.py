"""What holds for every attack: properties of its results, and what it does with input as users of other libraries send it."""

from __future__ import annotations

import contextlib
import math

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

from tsrfast import attacks
from tsrfast.attacks import APGD, MIM, PGD, Attack
from tsrfast.errors import InputError

# AutoAttack has remarks about networks as small and quick to fall as these.
pytestmark = pytest.mark.filterwarnings("ignore:AutoAttack:UserWarning")
QUICK = settings(max_examples=4, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.differing_executors])
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


def test_no_attack_is_forgotten(cases):
    public = {getattr(attacks, name) for name in attacks.__all__ if name != "Attack"}
    public = {t for t in public if isinstance(t, type) and issubclass(t, Attack)}
    assert {type(case.on(nn.Identity())) for case in cases} == public


def judged(model, x, y):
    """Cross-entropy [N] and answers of the model itself."""
    with torch.no_grad():
        z = model(x)
    return F.cross_entropy(z.double(), y, reduction="none"), z.argmax(1)


# ---- results


@QUICK
@given(
    n=st.integers(0, 5), seed=st.integers(0, 99), dtype=st.sampled_from(DTYPES), last=st.booleans(), scale=st.floats(0, 3),
    each=st.booleans(),
)  # fmt: skip
def test_in_ball_and_box_and_like_the_input(case, kind, images, excess, n, seed, dtype, last, scale, each):
    model = images.network(kind, dtype)
    x, y = images.batch(model, n, seed, dtype)
    x = x.contiguous(memory_format=torch.channels_last if last else torch.contiguous_format)
    changes = {}
    if case.norm is not None:
        eps = scale * case.attack.eps
        changes["eps"] = eps * torch.rand(n, generator=torch.Generator().manual_seed(seed)).round(decimals=1) if each else eps
    got = case.on(model, **changes).run(model, x, y)
    out = got.x_adv
    assert (out.shape, out.dtype, out.device, out.stride()) == (x.shape, x.dtype, x.device, x.stride())
    assert bool(((out >= 0) & (out <= 1)).all())  # NaN is not
    if case.norm is not None:
        assert bool((excess(x, out, case.norm, changes["eps"]) <= 0).all())
    assert got.success.shape == got.queries.shape == got.bad_gradients.shape == got.loss.shape == (n,)
    assert torch.equal(
        case.on(model, **changes)(model, x, y), out
    )  # `run` only adds what is known, and nothing is drawn elsewhere


@settings(QUICK, max_examples=3)
@given(cut=st.integers(2, 6), order=st.permutations(range(7)), seed=st.integers(0, 9))
def test_an_image_does_not_depend_on_its_batch(case, kind, images, cut, order, seed):
    """Up to 1e-6: sums over a batch of another size may be added in another order, and a rounding of one logit goes into l2 and l1 steps.
    A sign that flips, a decision that comes out differently, would be 1e-3 at least. In double on the eager path, where PyTorch's
    convolutions round differently by batch size, and signs of float32 gradients near 0 do flip."""
    dtype = torch.float32 if kind == "chain" else torch.float64
    model = images.network(kind, dtype)
    x, y = images.batch(model, 7, seed, dtype)
    index = torch.tensor([4, 0, 9, 10**12, 3, 1, 7])
    attack = case.on(model, **({"engine": "eager"} if case.name == "TI-DI-FGSM" else {}))
    if kind == "chain" and attack.plan(model, x).path == "eager":
        return  # of float32 in PyTorch nothing is claimed
    whole = attack.run(model, x, y, index)
    order = torch.tensor(order)
    for rows in order.split(cut):
        got = attack.run(model, x[rows], y[rows], index[rows])
        torch.testing.assert_close(got.x_adv, whole.x_adv[rows], rtol=0, atol=1e-6)
        assert torch.equal(got.success, whole.success[rows])


def test_no_radius_no_change(case, kind, images):
    if case.norm is None:
        return
    model = images.network(kind)
    x, y = images.batch(model)
    got = case.on(model, eps=0.0)(model, x, y)
    # A projection onto the l1 ball rounds a pixel now and then.
    torch.testing.assert_close(got, x, rtol=0, atol=1e-7 if case.norm == "l1" else 0.0)


def test_success_is_what_the_model_says(case, kind, images):
    model = images.network(kind)
    x, y = images.batch(model, 8)
    got = case.on(model).run(model, x, y)
    assert torch.equal(got.success, judged(model, got.x_adv, y)[1] != y)
    assert bool(got.success[3::4].all())  # wrong as they were
    assert int(got.success.sum()) > 2 or case.name.startswith(("Square", "TI-DI"))  # and not only these


def test_targets_become_likelier(case, kind, images):
    """The second likeliest class each, in wide balls: the attacks take few steps."""
    if not case.has("targeted"):
        return
    model = images.network(kind)
    x, _ = images.batch(model, 8)
    with torch.no_grad():
        target = model(x).topk(2).indices[:, 1]
    wide = {"eps": 6 * case.attack.eps} if case.norm is not None else {}
    wide |= {"queries": 60} if case.has("queries") else {}
    got = case.on(model, targeted=True, **wide).run(model, x, target)
    before, after = (judged(model, batch, target)[0] for batch in (x, got.x_adv))
    assert torch.equal(got.success, judged(model, got.x_adv, target)[1] == target)
    assert after.mean() < before.mean() - 1e-3


@pytest.mark.parametrize("make", [
    lambda n: PGD(steps=n, eps=0.1, step_size=0.01), lambda n: APGD(steps=n, eps=0.1, keep="best"),
    lambda n: MIM(steps=n, eps=0.1, step_size=0.01), lambda n: PGD("l2", 1.0, 0.1, n), lambda n: APGD("l1", 6.0, n, keep="best"),
])  # fmt: skip
def test_more_steps_are_stronger(make, kind, images):
    model = images.network(kind)
    x, y = images.batch(model, 32)
    losses = [judged(model, make(n)(model, x, y), y)[0].mean() for n in (1, 4, 16)]
    assert losses[0] < losses[1] < losses[2]


# ---- images


BAD_IMAGES = {
    "uint8": (lambda x: (x * 255).byte(), r"x must be a floating-point tensor \[N, C, H, W\], got torch.uint8"),
    "integers": (lambda x: (x * 255).long(), "x must be a floating-point tensor .* got torch.int64"),
    "0..255": (lambda x: x * 255, r"x must be pixels in \[0, 1\], got values in .*0..255\? divide by 255"),
    "normalised": (lambda x: (x - 0.5) / 0.25, r"x must be pixels in \[0, 1\], got values in \[-2, 2\]"),
    "centred": (lambda x: x - 0.5, r"x must be pixels in \[0, 1\], got values in \[-0.5, 0.5\]"),
    "NaN": (lambda x: x.clone().index_fill_(0, torch.tensor([1]), math.nan), "x must be finite, got NaN"),
    "numpy": (lambda x: x.numpy(), "x must be a floating-point tensor .* got ndarray"),
    "list": (list, "x must be a floating-point tensor .* got list"),
}


def test_refuses_images(case, images):
    model = images.network("chain")
    x, y = images.batch(model)
    for change, message in BAD_IMAGES.values():
        with pytest.raises(InputError, match=message):
            case.on(model)(model, change(x), y)


def test_one_image_without_its_batch(case, images):
    model = images.network("eager")
    x, y = images.batch(model)
    for label in (y[0], y[:1]):
        with pytest.raises(InputError, match=r"x\[None\]"):
            case.on(model)(model, x[0], label)


def test_refuses_images_of_another_dtype_than_the_model(case, images):
    model = images.network("chain")
    x, y = images.batch(model)
    for dtype in (torch.float64, torch.bfloat16, torch.float16):
        with pytest.raises(InputError, match=f"x must have the dtype of the model, torch.float32, got {dtype}"):
            case.on(model)(model, x.to(dtype), y)


def test_gradients_around_the_call_do_not_matter(case, kind, images):
    model = images.network(kind)
    x, y = images.batch(model)
    want = case.on(model)(model, x, y)
    for around in (contextlib.nullcontext, torch.no_grad, torch.inference_mode):
        with around():
            again = x.clone().requires_grad_()
            got = case.on(model)(model, again, y.clone())
        assert torch.equal(got, want)
        assert not got.requires_grad
        assert not got.is_inference()
        assert again.grad is None
        assert again.requires_grad


# ---- labels


BAD_LABELS = {
    "floats": (lambda y: y.float(), r"torch.float32"),
    "int32": (lambda y: y.int(), r"torch.int32"),
    "one-hot": (lambda y: F.one_hot(y, 10), r"torch.int64 of shape \(5, 10\)"),
    "probabilities": (lambda y: F.one_hot(y, 10).float(), r"torch.float32"),
    "column": (lambda y: y[:, None], r"torch.int64 of shape \(5, 1\)"),
    "too few": (lambda y: y[:-1], r"torch.int64 of shape \(4,\)"),
    "one for all": (lambda y: y[0], r"torch.int64 of shape \(\)"),
    "list": (lambda y: y.tolist(), r"list"),
    "numpy": (lambda y: y.numpy(), r"ndarray"),
}


def test_refuses_labels(case, images):
    model = images.network("chain")
    x, y = images.batch(model)
    for change, got in BAD_LABELS.values():
        with pytest.raises(InputError, match=rf"y must be int64 of shape \(5,\), got {got}"):
            case.on(model)(model, x, change(y))
    with pytest.raises(InputError, match="y is needed"):
        case.on(model)(model, x)


def test_refuses_labels_that_are_no_class(case, kind, images):
    """The authors' AutoAttack takes such images for misclassified as they are."""
    model = images.network(kind)
    x, y = images.batch(model)
    for label in (10, -1):
        y[2] = label
        with pytest.raises(InputError, match=rf"y must be in 0..9, the model's classes, got {label}"):
            case.on(model)(model, x, y)


# ---- models


class Around(nn.Module):
    """Another network with something done to what it returns."""

    def __init__(self, net, change):
        super().__init__()
        self.net, self.change = net, change

    def forward(self, x):
        return self.change(self.net(x))


BAD_OUTPUTS = {
    "tuple": (lambda z: (z, z), "got tuple"),
    "dictionary": (lambda z: {"logits": z}, "got dict"),
    "flat": (lambda z: z.flatten(), r"got \(50,\)"),
    "of other images": (lambda z: z[:-1], r"got \(4, 10\)"),
    "maps": (lambda z: z[:, :, None, None], r"got \(5, 10, 1, 1\)"),
}


def test_refuses_models_that_return_no_logits(case, images):
    model = images.network("eager")
    x, y = images.batch(model)
    for change, message in BAD_OUTPUTS.values():
        broken = Around(model, change)
        with pytest.raises(InputError, match=rf"model must return logits \[5, classes\], {message}"):
            case.on(broken)(broken, x, y)


def test_refuses_what_is_no_model(case, images):
    model = images.network("eager")
    x, y = images.batch(model)
    for bad in (lambda x: model(x), None, "resnet"):
        with pytest.raises(InputError, match=r"model must be an nn\.Module or a Chain"):
            case.on(model)(bad, x, y)


def test_refuses_a_model_on_another_device(case, kind, images):
    model = images.network(kind)
    x, y = images.batch(model)
    away = images.network(kind).to("meta")
    for n in (5, 0):
        with pytest.raises(InputError, match="model must be on x's device cpu, got meta"):
            case.on(model).run(away, x[:n], y[:n])
    if case.surrogates:
        with pytest.raises(InputError, match="must be on x's device cpu, got meta"):
            case.on(away).run(model, x, y)
    with pytest.raises(InputError, match="y must be on x's device cpu, got meta"):
        case.on(model)(model, x, y.to("meta"))


def test_a_model_without_gradient(case, images):
    """Is said to be so, or attacked by its answers alone."""
    net = images.network("eager")
    x, y = images.batch(net)
    model = Around(net, torch.Tensor.detach)
    if case.name.startswith("Square"):
        assert torch.equal(case.on(model)(model, x, y), case.on(net)(net, x, y))
        return
    with pytest.raises(InputError, match="must be differentiable"):
        case.on(model)(model, x, y)


class NaNs(nn.Module):
    """A network whose logits are NaN for images with a mark."""

    def __init__(self, net):
        super().__init__()
        self.net = net

    def forward(self, x):
        return self.net(x) + torch.where(x[:, :1, 0, 0] > 0.9, math.nan, 0.0)


def test_nan_logits_of_one_image_are_its_own(case, kind, images, excess):
    model = NaNs(images.network(kind, torch.float64))
    x, y = images.batch(model.net, 5, dtype=torch.float64)
    x[:, 0, 0, 0] = torch.tensor([0.5, 0.5, 1.0, 0.5, 0.5])
    y[2] = 0  # argmax is 0 where logits are NaN
    attack = case.on(model)
    others = torch.tensor([0, 1, 3, 4])
    if case.name.startswith("AutoAttack"):
        with pytest.raises(InputError, match="logits that are no NaN, got NaN for 1 of 5 images"):
            attack(model, x, y)
        return
    got = attack.run(model, x, y)
    assert bool(((got.x_adv >= 0) & (got.x_adv <= 1)).all())
    if case.norm is not None:
        assert bool((excess(x, got.x_adv, case.norm, case.attack.eps) <= 0).all())
    alone = attack.run(model, x[others], y[others], others)
    torch.testing.assert_close(got.x_adv[others], alone.x_adv, rtol=0, atol=1e-9)
    assert torch.equal(got.success[others], alone.success)
