"""Checkpoints of milesial/Pytorch-UNet: the same output; no code is run; other files are refused in one line.

The network here is written from a description of that repository's layout (names and shapes of its tensors).
"""

import os
import pickle
import re
import shlex

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from click.testing import CliRunner
from conftest import TINY, make_discs, make_photos
from PIL import Image
from torch import nn

import unet_ray
from unet_ray.cli import main
from unet_ray.config import UserError
from unet_ray.models import checkpoint
from unet_ray.models.milesial import import_milesial


class Double(nn.Module):
    def __init__(self, i: int, o: int, bias: bool = False) -> None:
        super().__init__()
        first, second = (nn.Conv2d(c, o, 3, padding=1, bias=bias) for c in (i, o))
        self.double_conv = nn.Sequential(first, nn.BatchNorm2d(o), nn.ReLU(), second, nn.BatchNorm2d(o), nn.ReLU())

    def forward(self, x):
        return self.double_conv(x)


class Down(nn.Module):
    def __init__(self, i: int, o: int, bias: bool) -> None:
        super().__init__()
        self.maxpool_conv = nn.Sequential(nn.MaxPool2d(2), Double(i, o, bias))

    def forward(self, x):
        return self.maxpool_conv(x)


class Up(nn.Module):
    def __init__(self, i: int, o: int, bias: bool) -> None:
        super().__init__()
        self.up = nn.ConvTranspose2d(i, i // 2, 2, stride=2)
        self.conv = Double(i, o, bias)

    def forward(self, x, skip):
        x = self.up(x)
        rows, columns = (s - t for s, t in zip(skip.shape[-2:], x.shape[-2:], strict=True))
        x = F.pad(x, [columns // 2, columns - columns // 2, rows // 2, rows - rows // 2])
        return self.conv(torch.cat([skip, x], dim=1))


class Out(nn.Module):
    def __init__(self, i: int, o: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(i, o, 1)

    def forward(self, x):
        return self.conv(x)


class StandIn(nn.Module):
    """uint8 / 255, float [N,C,H,W] -> logits [N,K,H,W]; random weights and running statistics."""

    def __init__(self, channels: int, classes: int, base: int = 8, depth: int = 4, bias: bool = False) -> None:
        super().__init__()
        self.depth, widths = depth, [base * 2**level for level in range(depth + 1)]
        self.inc = Double(channels, base, bias)
        for n in range(1, depth + 1):
            setattr(self, f"down{n}", Down(widths[n - 1], widths[n], bias))
            setattr(self, f"up{n}", Up(widths[depth - n + 1], widths[depth - n], bias))
        self.outc = Out(base, classes)
        generator = torch.Generator().manual_seed(7)
        for module in self.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.running_mean.normal_(0, 0.3, generator=generator)
                module.running_var.uniform_(0.3, 2, generator=generator)
                module.weight.data.uniform_(0.5, 2, generator=generator)
                module.bias.data.normal_(generator=generator)
            elif isinstance(module, (nn.Conv2d, nn.ConvTranspose2d)):
                inputs = module.in_channels * (9 if module.kernel_size == (3, 3) else 1)
                module.weight.data.normal_(0, (2 / inputs) ** 0.5, generator=generator)
                if module.bias is not None:
                    module.bias.data.normal_(generator=generator)
        self.eval()

    def forward(self, x):
        skips = [self.inc(x)]
        for n in range(1, self.depth + 1):
            skips.append(getattr(self, f"down{n}")(skips[-1]))
        x = skips.pop()
        for n in range(1, self.depth + 1):
            x = getattr(self, f"up{n}")(x, skips.pop())
        return self.outc(x)


def saved(state, path) -> str:
    torch.save(state, path)
    return str(path)


@torch.inference_mode()
def assert_same_output(theirs: nn.Module, location: str, channels: int, sides: tuple[int, int] = (48, 80)) -> None:
    generator = torch.Generator().manual_seed(1)
    image = torch.randint(0, 256, (2, channels, *sides), dtype=torch.uint8, generator=generator)
    model, _ = checkpoint.load_model(location)
    expected, found = theirs(image.float() / 255), model.eval()(image)
    assert found.shape == expected.shape
    assert expected.std() > 0.1  # of a network that says the same everywhere, anything would be equal
    assert torch.allclose(found, expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))


def test_the_stand_in_has_the_names_and_shapes_of_the_real_checkpoints():
    state = StandIn(3, 2, base=64).state_dict()
    assert len(state) == 118  # 18 convolutions without, 5 with a bias, 18 norms of 5 tensors
    for name, shape in {
        "inc.double_conv.0.weight": (64, 3, 3, 3),
        "inc.double_conv.4.running_var": (64,),
        "down4.maxpool_conv.1.double_conv.3.weight": (1024, 1024, 3, 3),
        "down1.maxpool_conv.1.double_conv.1.num_batches_tracked": (),
        "up1.up.weight": (1024, 512, 2, 2),
        "up1.conv.double_conv.0.weight": (512, 1024, 3, 3),
        "up4.up.bias": (64,),
        "outc.conv.weight": (2, 64, 1, 1),
    }.items():
        assert tuple(state[name].shape) == shape, name


@pytest.mark.parametrize(
    ("channels", "classes", "base", "depth"), [(3, 1, 8, 4), (3, 2, 8, 4), (1, 3, 8, 4), (3, 2, 4, 2), (3, 2, 64, 4)]
)
def test_the_output_is_the_same_to_rounding(tmp_path, channels, classes, base, depth):
    theirs = StandIn(channels, classes, base, depth)
    card = import_milesial(saved(theirs.state_dict(), tmp_path / "m.pth"), str(tmp_path / "model"), image_size=(48, 80))
    config = card.model
    found = (config.in_channels, config.num_classes, config.base_channels, config.depth)
    assert found == (channels, classes, base, depth)
    assert_same_output(theirs, str(tmp_path / "model"), channels)


def test_older_and_wrapped_checkpoints_are_read_too(tmp_path):
    old = StandIn(3, 2, bias=True)  # convolutions that have a bias before the norm
    wrapped = {"epoch": 3, "state_dict": {f"module.{name}": tensor for name, tensor in old.state_dict().items()}}
    import_milesial(saved(wrapped, tmp_path / "old.pth"), str(tmp_path / "old"), image_size=48)
    assert_same_output(old, str(tmp_path / "old"), 3)
    plain = StandIn(3, 1)
    torch.save(plain.state_dict(), tmp_path / "plain.pth", _use_new_zipfile_serialization=False)
    import_milesial(str(tmp_path / "plain.pth"), str(tmp_path / "plain"), image_size=48)
    assert_same_output(plain, str(tmp_path / "plain"), 3)


def test_values_and_names_of_the_classes_come_from_the_argument_the_checkpoint_or_the_default(tmp_path):
    def card(number: int, count: int, stored=None, **given):
        state = dict(StandIn(3, count, 4, 2).state_dict()) | ({} if stored is None else {"mask_values": stored})
        path = saved(state, tmp_path / f"{number}.pth")
        return import_milesial(path, str(tmp_path / str(number)), image_size=32, **given)

    assert card(0, 2, [0, 7]).data.mask_values == (0, 7)
    assert card(1, 2, [0, 7], mask_values=[3, 4]).data.mask_values == (3, 4)
    assert card(2, 1).data.mask_values == (0, 255)
    assert card(3, 3).data.mask_values == (0, 1, 2)
    colours = card(4, 3, [[0, 0, 0], [9, 0, 0], [0, 9, 0]])
    assert (colours.data.mask_values, colours.classes) == ((0, 1, 2), ("background", "class 1", "class 2"))
    assert card(5, 1).classes == card(6, 2).classes == ("background", "foreground")
    named = card(7, 2, classes=["road", "car"])
    assert (named.classes, named.image_size, named.flips) == (("road", "car"), (32, 32), "")
    with pytest.raises(UserError, match="mask_values has 3 entries: 2 are needed"):
        card(8, 2, [0, 1, 2])


def test_an_imported_model_predicts_evaluates_and_trains_on(tmp_path):
    theirs = StandIn(3, 2, 4, 2)
    model = tmp_path / "model"
    import_milesial(saved(theirs.state_dict(), tmp_path / "m.pth"), str(model), image_size=32)
    photos = make_photos(tmp_path / "photos", 6)
    (photos / "same.png").write_bytes(b"")
    image = np.random.default_rng(0).integers(0, 255, (32, 32, 3)).astype(np.uint8)
    Image.fromarray(image).save(photos / "same.png")
    unet_ray.predict(model, photos, tmp_path / "out", local=True, precision="fp32", backend="torch")
    with Image.open(tmp_path / "out/masks/same.png") as mask, torch.inference_mode():
        logits = theirs(torch.from_numpy(image).permute(2, 0, 1)[None].float() / 255)[0]
        # Where the two classes are nearly as likely, float16 between the stages may decide.
        clear = (logits[1] - logits[0]).abs() > 0.05
        assert clear.float().mean() > 0.9
        assert (torch.from_numpy(np.array(mask)) == logits.argmax(0))[clear].all()
    images, masks = make_discs(tmp_path / "discs", 8)
    assert unet_ray.evaluate(model, images, masks, local=True).images == 8
    settings = {name: value for name, value in TINY if not name.startswith("model.")}
    run = unet_ray.train(images, masks, tmp_path / "run", init=model, settings=settings, local=True)
    assert run.epochs == 2
    assert checkpoint.read_card(f"{run.out}/model").model == checkpoint.read_card(str(model)).model


class Malicious:
    def __init__(self, target: str) -> None:
        self.target = target

    def __reduce__(self):
        return (os.mkdir, (self.target,))


def test_code_in_a_checkpoint_is_not_run(tmp_path):
    target = tmp_path / "owned"
    state = dict(StandIn(3, 1, 4, 2).state_dict())
    for name, write in {
        "zip.pth": lambda path: torch.save({**state, "mask_values": Malicious(str(target))}, path),
        "bare.pth": lambda path: path.write_bytes(pickle.dumps(Malicious(str(target)))),
        "whole.pth": lambda path: torch.save(StandIn(3, 1, 4, 2), path),
    }.items():
        write(tmp_path / name)
        with pytest.raises(UserError, match=rf"{name}: holds more than weights.*none of its code was run") as error:
            import_milesial(str(tmp_path / name), str(tmp_path / "model"), image_size=32)
        assert "\n" not in str(error.value)
    assert not target.exists() and not (tmp_path / "model").exists()
    pickle.loads((tmp_path / "bare.pth").read_bytes())
    assert target.exists()  # it would have done so


def without(state: dict, name: str) -> dict:
    return {key: tensor for key, tensor in state.items() if key != name}


def test_other_files_are_refused_in_one_line_that_names_the_first_difference(tmp_path):
    state = dict(StandIn(3, 2, 4, 2).state_dict())
    bilinear = {key: tensor for key, tensor in state.items() if ".up." not in key}
    mistakes = {
        "no up1.up.weight, so it was trained with --bilinear": bilinear,
        "not a state dict": [1, 2],
        "not a state dict: save": {"epoch": 3},
        "inc.double_conv.0.weight is missing": {"encoder.weight": torch.zeros(3)},
        "down1.maxpool_conv.1.double_conv.0.weight is missing": {
            key: tensor for key, tensor in state.items() if not key.startswith("down")
        },
        "down1.maxpool_conv.1.double_conv.4.running_mean is missing": without(
            state, "down1.maxpool_conv.1.double_conv.4.running_mean"
        ),
        "outc.conv.weight is missing": without(state, "outc.conv.weight"),
        "up2.up.bias is missing": without(state, "up2.up.bias"),
        r"inc.double_conv.3.weight is \[4, 5, 3, 3\]: \[4, 4, 3, 3\] was expected": {
            **state,
            "inc.double_conv.3.weight": torch.zeros(4, 5, 3, 3),
        },
        r"inc.double_conv.0.weight is \[4\]": {**state, "inc.double_conv.0.weight": torch.zeros(4)},
        # A network of 20 levels would not fit into any memory: it is compared before it is built.
        "down3.maxpool_conv.1.double_conv.0.weight is": {**state, **huge()},
        "outc.extra is unknown": {**state, "outc.extra": torch.zeros(1)},
    }
    for number, (message, wrong) in enumerate(mistakes.items()):
        path = saved(wrong, tmp_path / f"{number}.pth")
        with pytest.raises(UserError, match=rf"/{number}\.pth: {message}") as error:
            import_milesial(path, str(tmp_path / "model"), image_size=32)
        assert "\n" not in str(error.value)
    (tmp_path / "text.pth").write_text("<html>404</html>")
    (tmp_path / "cut.pth").write_bytes((tmp_path / "0.pth").read_bytes()[:2000])
    for name, message in {"text": "none of its code", "cut": "not a checkpoint", "gone": "No such file"}.items():
        with pytest.raises(UserError, match=rf"/{name}\.pth: .*{message}") as error:
            import_milesial(str(tmp_path / f"{name}.pth"), str(tmp_path / "model"), image_size=32)
        assert "\n" not in str(error.value)
    assert not (tmp_path / "model").exists()


def huge() -> dict[str, torch.Tensor]:
    """Levels 3 to 20 below those two."""
    return {f"down{n}.maxpool_conv.1.double_conv.0.weight": torch.zeros(1, 1, 3, 3) for n in range(3, 21)}


def test_a_folder_that_is_in_use_is_left_alone(tmp_path):
    path = saved(StandIn(3, 1, 4, 2).state_dict(), tmp_path / "m.pth")
    with pytest.raises(UserError, match="holds other files: choose another --out"):
        import_milesial(path, str(tmp_path), image_size=32)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["m.pth"]


@pytest.mark.parametrize(
    ("key", "prefix"),
    [("model_state_dict", ""), ("state_dict", "model."), ("state_dict", "net.unet."), (None, "module.")],
)
def test_checkpoints_of_training_programs_are_unwrapped(tmp_path, key, prefix):
    state = StandIn(3, 1, 4, 2).state_dict()
    inner = {f"{prefix}{name}": tensor for name, tensor in state.items()}
    if prefix:
        inner["loss.weight"] = torch.ones(2)  # of the larger module
    plain = import_milesial(saved(state, tmp_path / "plain.pth"), str(tmp_path / "plain"), image_size=32)
    torch.save({key: inner, "epoch": 3, "lr": 1e-3} if key else inner, tmp_path / "wrapped.ckpt")
    wrapped = import_milesial(str(tmp_path / "wrapped.ckpt"), str(tmp_path / "model"), image_size=32)
    assert wrapped.weights_sha256 == plain.weights_sha256


def test_two_networks_in_one_checkpoint_are_refused(tmp_path):
    state = StandIn(3, 1, 4, 2).state_dict()
    torch.save({f"{who}.{name}": t for who in ("student", "teacher") for name, t in state.items()}, tmp_path / "x.pth")
    with pytest.raises(UserError, match=r"holds 2 networks \('student.', 'teacher.'\)"):
        import_milesial(str(tmp_path / "x.pth"), str(tmp_path / "model"), image_size=32)


@pytest.mark.parametrize("name", ["m.pth", "my model.pt"])
def test_a_checkpoint_where_a_model_is_needed_names_the_import_and_that_works_as_printed(tmp_path, name, monkeypatch):
    monkeypatch.chdir(tmp_path)
    saved(StandIn(3, 1, 4, 2).state_dict(), tmp_path / name)
    images, masks = make_discs(tmp_path / "discs", 2)
    for arguments in (
        ["predict", name, "discs/images", "--out", "O", "--local"],
        ["train", "--init", name, "--images", str(images), "--masks", str(masks), "--out", "R", "--local"],
    ):
        result = CliRunner().invoke(main, arguments)
        assert result.exit_code == 2, result.output
        program, *printed = shlex.split(re.search("`(unet-ray import [^`]*)`", result.output)[1])
        assert program == "unet-ray" and not (tmp_path / "O").exists() and not (tmp_path / "R").exists()
    assert CliRunner().invoke(main, printed).exit_code == 0
    assert CliRunner().invoke(main, ["predict", "MODEL", "discs/images", "--out", "O", "--local"]).exit_code == 0
