"""LPIPS, FID, CLIP score and ImageReward, with networks of random weights in the place of the published ones."""

import csv
import sys
import types

import numpy
import pytest
import torch
from scipy.linalg import sqrtm
from torch import nn

from cachedit import metrics
from cachedit.metrics import fid, lpips, weights
from pictures import TEST, TRUE, save


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv(weights.VARIABLE, str(tmp_path / "weights"))
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    (tmp_path / "weights").mkdir()
    return tmp_path / "weights"


@pytest.mark.parametrize(
    ("compute", "file"), [(metrics.compute_lpips, lpips.FILE), (metrics.compute_fid, fid.FILE)], ids=["lpips", "fid"]
)
def test_weights_that_are_missing(folder, compute, file):
    with pytest.raises(FileNotFoundError, match=f"needs the file {file}, .* get it from https://.* into {folder} "):
        compute(TRUE[0], TEST[0])


@pytest.mark.parametrize("content", [b"no weights" * 99, {"layers.0.weight": torch.ones(2)}], ids=["bytes", "others"])
@pytest.mark.parametrize(
    ("compute", "file"), [(metrics.compute_lpips, lpips.FILE), (metrics.compute_fid, fid.FILE)], ids=["lpips", "fid"]
)
def test_weights_that_cannot_be_read(folder, compute, file, content):
    if isinstance(content, bytes):
        (folder / file).write_bytes(content)
    else:
        torch.save(content, folder / file)
    with pytest.raises(
        ValueError, match=f"cannot read its weights in {folder}/{file}: .*; get the file again from https"
    ):
        compute(TRUE[0], TEST[0])


def alexnet():
    """The feature layers, numbered as in torchvision's AlexNet."""
    torch.manual_seed(0)
    return nn.Sequential(
        *(nn.Conv2d(3, 64, 11, stride=4, padding=2), nn.ReLU(), nn.MaxPool2d(3, 2)),
        *(nn.Conv2d(64, 192, 5, padding=2), nn.ReLU(), nn.MaxPool2d(3, 2)),
        *(nn.Conv2d(192, 384, 3, padding=1), nn.ReLU(), nn.Conv2d(384, 256, 3, padding=1), nn.ReLU()),
        *(nn.Conv2d(256, 256, 3, padding=1), nn.ReLU(), nn.MaxPool2d(3, 2)),
    )


def test_lpips_is_that_of_torchmetrics(folder, monkeypatch):
    import torchmetrics.functional.image.lpips as reference

    features, pictures = alexnet(), numpy.random.default_rng(1).integers(0, 256, (2, 64, 80, 3), dtype=numpy.uint8)
    torch.save({f"features.{name}": value for name, value in features.state_dict().items()}, folder / lpips.FILE)
    value, count = metrics.compute_lpips(*pictures)
    monkeypatch.setattr(reference, "_get_tv_model_features", lambda *_: features)
    network = reference._NoTrainLpips(net="alex")
    a, b = (torch.from_numpy(picture).permute(2, 0, 1)[None] / 127.5 - 1 for picture in pictures)
    assert count == 1 and value == pytest.approx(network(a, b).item(), rel=1e-5) and value > 0.01
    assert metrics.compute_lpips(TRUE[0].repeat(3, 0), TRUE[0].repeat(3, 0)) == (0, 1)


class Statistics(nn.Module):
    """Six features a picture, called as the Inception network is."""

    def forward(self, pictures: torch.Tensor, return_features: bool = False) -> torch.Tensor:
        assert return_features and pictures.dtype == torch.uint8
        values = pictures.float() / 255
        return torch.cat([values.mean((2, 3)), values.std((2, 3))], 1)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_fid_is_the_distance_of_two_gaussians(folder, tmp_path):
    torch.jit.script(Statistics()).save(folder / fid.FILE)
    random = numpy.random.default_rng(2)
    true = random.integers(0, 200, (12, 16, 16, 3), dtype=numpy.uint8)
    test = random.integers(20, 256, (12, 16, 16, 3), dtype=numpy.uint8)
    names = tuple(f"{i}.png" for i in range(12))
    paths = save(tmp_path / "true", true, names), save(tmp_path / "test", test, names)
    a, b = (Statistics()(torch.from_numpy(x).permute(0, 3, 1, 2), True).double().numpy() for x in (true, test))
    cov_a, cov_b = numpy.cov(a, rowvar=False), numpy.cov(b, rowvar=False)
    expected = ((a.mean(0) - b.mean(0)) ** 2).sum() + numpy.trace(cov_a + cov_b - 2 * sqrtm(cov_a @ cov_b).real)
    assert metrics.compute_fid(*paths) == (pytest.approx(expected, rel=1e-3), 12)
    batched = metrics.FrechetInceptionDistance(batch_size=5)
    assert batched.compute_fid(*paths) == (pytest.approx(expected, rel=1e-3), 12)
    with pytest.raises(ValueError, match="at least two pictures on each side, got 1"):
        metrics.compute_fid(true[0], test[0])
    with pytest.raises(ValueError, match="batch_size must be at least 1, got 0"):
        metrics.compute_fid(*paths, batch_size=0)


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    """A CLIP model of random weights whose vocabulary is the alphabet."""
    from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPProcessor, CLIPTokenizer

    path = tmp_path_factory.mktemp("clip")
    letters = "abcdefghijklmnopqrstuvwxyz"
    tokens = [*letters, *(f"{letter}</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    tokenizer = CLIPTokenizer(vocab={token: number for number, token in enumerate(tokens)}, merges=[])
    small = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    torch.manual_seed(0)
    model = CLIPModel(
        CLIPConfig(
            text_config={**small, "vocab_size": len(tokens), "bos_token_id": 52, "eos_token_id": 53},
            vision_config={**small, "image_size": 32, "patch_size": 8},
            projection_dim=16,
        )
    ).eval()
    processor = CLIPProcessor(CLIPImageProcessor(size={"shortest_edge": 32}, crop_size=32), tokenizer)
    model.save_pretrained(path)
    processor.save_pretrained(path)
    return str(path), model, processor


def test_clip_score(clip, tmp_path, monkeypatch):
    path, model, processor = clip
    prompts = ["a red ring", "two blue squares", "green"]
    inputs = processor(text=prompts, images=list(TRUE), return_tensors="pt", padding=True)
    with torch.no_grad():
        output = model(**inputs)
    cosines = (output.image_embeds * output.text_embeds).sum(-1).tolist()
    expected = [max(100 * cosine, 0) for cosine in cosines]
    assert max(expected) > 0.1
    folder = save(tmp_path / "pictures", TRUE, ("2.png", "10.png", "11.png"))  # in natural order
    assert metrics.compute_clip_score(folder, prompts, path) == (pytest.approx(sum(expected) / 3, rel=1e-3), 3)
    (tmp_path / "prompts.txt").write_text("\n".join(prompts) + "\n")
    monkeypatch.setenv("CLIP_MODEL_DIR", path)
    assert metrics.compute_clip_score(folder, str(tmp_path / "prompts.txt"))[0] == pytest.approx(
        sum(expected) / 3, rel=1e-3
    )
    assert metrics.compute_clip_score(TRUE[1], prompts[1]) == (pytest.approx(expected[1], rel=1e-3, abs=1e-3), 1)


def test_a_clip_model_that_is_missing(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"needs the model \S*nothing, which is not on this .*CLIP_MODEL_DIR"):
        metrics.compute_clip_score(TRUE[0], "a ring", str(tmp_path / "nothing"))
    with pytest.raises(ValueError, match=f"clip_model_path: {tmp_path} does not hold a CLIP model"):
        metrics.compute_clip_score(TRUE[0], "a ring", str(tmp_path))


@pytest.fixture
def image_reward(monkeypatch):
    """The package's two calls that are used; the reward is the picture's mean plus the prompt's length."""
    package = types.ModuleType("ImageReward")
    package.loaded = []

    def load(name, device, download_root, med_config):
        package.loaded.append((name, download_root, med_config))
        model = types.SimpleNamespace(score=lambda prompt, picture: numpy.asarray(picture).mean() + len(prompt))
        return model

    package.load = load
    monkeypatch.setitem(sys.modules, "ImageReward", package)
    return package


def test_image_reward(image_reward, tmp_path):
    for file in ("ImageReward.pt", "med_config.json"):
        with pytest.raises(FileNotFoundError, match=f"needs the file {file}, .* put it into {tmp_path} "):
            metrics.compute_image_reward(TRUE[0], "abc", str(tmp_path))
        (tmp_path / file).touch()
    assert metrics.compute_image_reward(TRUE[0], "abc", str(tmp_path)) == (pytest.approx(TRUE[0].mean() + 3), 1)
    assert image_reward.loaded == [(f"{tmp_path}/ImageReward.pt", str(tmp_path), f"{tmp_path}/med_config.json")]


def test_without_the_package_image_reward():
    with pytest.raises(ImportError, match="pip install image-reward"):
        metrics.compute_image_reward(TRUE[0], "abc")


def test_prompts_and_pictures_that_are_missing(image_reward, tmp_path, caplog):
    for file in ("ImageReward.pt", "med_config.json"):
        (tmp_path / file).touch()
    for pictures, prompts, error, message in [
        (TRUE[0], [], ValueError, "there is no prompt"),
        (str(tmp_path), "a", ValueError, "there is no picture in"),
        ("nowhere", "a", FileNotFoundError, "no file or folder nowhere"),
        (TRUE[0], "nowhere.txt", FileNotFoundError, "prompts: there is no file nowhere.txt"),
        (TRUE[0], [1], TypeError, r"prompts must be a string, a list of strings or the path of a text file, got \[1\]"),
        (TRUE[0], None, TypeError, "prompts must be a string, .*, got None"),
        (None, "a", TypeError, "img_dir must be a path or an array .*, got NoneType"),
    ]:
        with pytest.raises(error, match=message):
            metrics.compute_image_reward(pictures, prompts, str(tmp_path))
    assert metrics.compute_image_reward(TRUE[0], ["a", "b"], str(tmp_path))[1] == 1
    assert "1 pictures and 2 prompts" in caplog.text


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_all_of_them_from_the_shell(folder, clip, image_reward, tmp_path, monkeypatch, capsys):
    """``cachedit metrics all``: with every file in its place nothing is left out, and values are those of Python."""
    from cachedit.cli import metrics as command

    torch.save({f"features.{name}": value for name, value in alexnet().state_dict().items()}, folder / lpips.FILE)
    torch.jit.script(Statistics()).save(folder / fid.FILE)
    for file in ("ImageReward.pt", "med_config.json"):
        (tmp_path / file).touch()
    monkeypatch.setenv("CLIP_MODEL_DIR", clip[0])
    monkeypatch.setenv("IMAGEREWARD_MODEL_DIR", str(tmp_path))
    random = numpy.random.default_rng(3)
    true = save(tmp_path / "true", random.integers(0, 256, (3, 64, 80, 3), dtype=numpy.uint8))
    test = save(tmp_path / "test", random.integers(0, 256, (3, 64, 80, 3), dtype=numpy.uint8))
    (tmp_path / "prompts.txt").write_text("a red ring\ntwo blue squares\ngreen\n")
    flags = ["-i1", true, "-i2", test, "-p", str(tmp_path / "prompts.txt"), "-b", "2", "--csv", str(tmp_path / "a.csv")]
    assert command.run(["all", *flags]) == 0
    assert "left out" not in capsys.readouterr().out
    (row,) = csv.DictReader((tmp_path / "a.csv").open())
    expected = {name: getattr(metrics, f"compute_{name}")(true, test)[0] for name in ("lpips", "fid", "psnr")}
    for name in ("clip_score", "image_reward"):
        expected[name] = getattr(metrics, f"compute_{name}")(test, str(tmp_path / "prompts.txt"))[0]
    assert row["count"] == "3" and {name: float(row[name]) for name in expected} == pytest.approx(expected, rel=1e-4)
