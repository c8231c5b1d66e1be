import os
import re
import subprocess
import sys
from types import SimpleNamespace

import numpy
import pytest
import torch
from diffusers import FluxTransformer2DModel
from PIL import Image
from typer.testing import CliRunner

import cachedit
from cachedit.cli import generate, output
from cachedit.cli.app import app
from cachedit.embedded import EmbeddedPipeline, load_pipeline
from cachedit.metrics import compute_psnr

TAYLOR = """
cache_config: {max_warmup_steps: 3, Fn_compute_blocks: 1, residual_diff_threshold: 0.9, enable_taylorseer: true}
"""


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    """Files are written to a folder of the test's own; the environment has no settings."""
    monkeypatch.chdir(tmp_path)
    for name in os.environ:
        if name.startswith(("CACHEDIT_", "SGLANG_")):
            monkeypatch.delenv(name)
    return tmp_path


def invoke(*arguments):
    return CliRunner().invoke(app, ["generate", "--device", "cpu", *map(str, arguments)], env={"COLUMNS": "400"})


def run(*arguments):
    result = invoke(*arguments)
    assert result.exit_code == 0, result.output
    return result.output


def cached_steps(text):
    """The column Cache Steps of the summary."""
    return [int(line.split("|")[4]) for line in text.splitlines() if line.startswith("| FluxTransformer")]


def draw(steps, seed=42, prompt=generate.PROMPT, enable=lambda pipe: None):
    pipe = load_pipeline()
    pipe.set_progress_bar_config(disable=True)
    enable(pipe)
    image = pipe(prompt, num_inference_steps=steps, generator=torch.Generator().manual_seed(seed)).images[0]
    return numpy.asarray(image)


def test_a_file_of_settings_and_the_picture_it_gives(elsewhere):
    (elsewhere / "cache.yaml").write_text(TAYLOR)
    text = run("--prompt", "a green ring", "--num-inference-steps", 8, "--seed", 3, "--cache-dit-config", "cache.yaml")
    expected = draw(
        8, 3, "a green ring", lambda pipe: cachedit.enable_cache(pipe, *cachedit.load_cache_config("cache.yaml"))
    )
    assert cached_steps(text) == [5] and "wrote outputs/a_green_ring.png" in text
    numpy.testing.assert_array_equal(numpy.asarray(Image.open("outputs/a_green_ring.png")), expected)


def test_the_environment(monkeypatch):
    monkeypatch.setenv("SGLANG_CACHE_DIT_RDT", "0.9")
    monkeypatch.setenv("SGLANG_CACHE_DIT_WARMUP", "2")
    monkeypatch.setenv("CACHEDIT_MC", "1")
    assert cached_steps(run("--num-inference-steps", 8, "--no-save-output")) == [3]
    monkeypatch.setenv("CACHEDIT_ENABLED", "false")
    text = run("--num-inference-steps", 4, "--output-path", "here", "--output-file-name", "plain.png")
    assert cached_steps(text) == []
    numpy.testing.assert_array_equal(numpy.asarray(Image.open("here/plain.png")), draw(4))


def test_compare(monkeypatch):
    monkeypatch.setenv("CACHEDIT_SCM_COMPUTE_BINS", "3,1,1")
    monkeypatch.setenv("CACHEDIT_SCM_CACHE_BINS", "2,1")
    monkeypatch.setenv("CACHEDIT_SCM_POLICY", "static")
    text = run("--num-inference-steps", 8, "--compare", "--output-file-name", "x.png")
    plain, cached = (numpy.asarray(Image.open(f"outputs/{name}")) for name in ("x-plain.png", "x.png"))
    numpy.testing.assert_array_equal(plain, draw(8))
    seconds = {name: float(re.search(rf"{name} +(\d+\.\d+) ", text)[1]) for name in ("plain", "cached")}
    speed, decibels = re.search(r"cached +\S+ +(\S+)x +(\S+) ", text).groups()
    assert float(speed) == pytest.approx(seconds["plain"] / seconds["cached"], rel=0.05)
    assert float(decibels) == pytest.approx(compute_psnr(plain, cached)[0], abs=0.01) and cached_steps(text) == [3]


def test_compare_draws_nothing_before_the_cache_is_known_to_fit(monkeypatch):
    monkeypatch.setenv("CACHEDIT_FN", "99")
    monkeypatch.setattr(EmbeddedPipeline, "__call__", lambda *args, **kwargs: pytest.fail("drawn"))
    result = invoke("--compare", "--no-save-output")
    assert result.exit_code == 2 and "Fn_compute_blocks + Bn_compute_blocks = 99" in result.output


@pytest.mark.parametrize(("blocks", "expected"), [(["FluxTransformerBlock"], "blocks"), (None, "whole")])
def test_warmup_and_compile_come_before_what_counts(monkeypatch, blocks, expected):
    happened = []
    monkeypatch.setattr(FluxTransformer2DModel, "_repeated_blocks", blocks)
    monkeypatch.setattr(FluxTransformer2DModel, "compile_repeated_blocks", lambda self: happened.append("blocks"))
    monkeypatch.setattr(FluxTransformer2DModel, "compile", lambda self: happened.append("whole"))
    call = EmbeddedPipeline.encode_prompt
    monkeypatch.setattr(EmbeddedPipeline, "encode_prompt", lambda *args: happened.append("run") or call(*args))
    run("--warmup", "--enable-torch-compile", "--num-inference-steps", 2, "--no-save-output")
    assert happened == [expected, "run", "run"]


def test_several_prompts_and_a_saved_pipeline(elsewhere):
    load_pipeline().save_pretrained(elsewhere / "saved")
    prompts = ("--prompt", "a red ring", "--prompt", "a blue ring")
    text = run("--model-path", elsewhere / "saved", *prompts, "--num-inference-steps", 4)
    assert "outputs/a_red_ring-0.png and outputs/a_red_ring-1.png" in text
    assert all(os.path.isfile(f"outputs/a_red_ring-{number}.png") for number in (0, 1))


def alphabet():
    """A tokenizer of letters."""
    from transformers import CLIPTokenizer

    letters = "abcdefghijklmnopqrstuvwxyz"
    tokens = [*letters, *(f"{letter}</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    return CLIPTokenizer(vocab={token: number for number, token in enumerate(tokens)}, merges=[], model_max_length=77)


@pytest.fixture(scope="module")
def stable_diffusion3(tmp_path_factory):
    """A folder with a whole pipeline of random weights: three text encoders with one tokenizer, transformer and VAE."""
    from transformers import CLIPTextConfig, CLIPTextModelWithProjection, T5Config, T5EncoderModel

    from pipelines.stable_diffusion3 import sd3

    tokenizer = alphabet()
    config = CLIPTextConfig(
        **{"hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2},
        **{"projection_dim": 8, "vocab_size": len(tokenizer), "bos_token_id": 52, "eos_token_id": 53},
    )
    torch.manual_seed(0)
    encoders = {name: CLIPTextModelWithProjection(config).eval() for name in ("text_encoder", "text_encoder_2")}
    pipe = sd3("StableDiffusion3Pipeline").pipe
    t5 = T5EncoderModel(
        T5Config(vocab_size=len(tokenizer), d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2)
    ).eval()
    pipe.register_modules(
        tokenizer=tokenizer, tokenizer_2=tokenizer, tokenizer_3=tokenizer, text_encoder_3=t5, **encoders
    )
    folder = tmp_path_factory.mktemp("model")
    pipe.save_pretrained(folder)
    return folder


def test_another_pipeline_from_a_folder(stable_diffusion3, monkeypatch):
    monkeypatch.setenv("SGLANG_CACHE_DIT_SCM_PRESET", "fast")
    monkeypatch.setenv("SGLANG_CACHE_DIT_SCM_POLICY", "static")
    text = run(
        *("--model-path", stable_diffusion3, "--prompt", "a cat", "--negative-prompt", "a dog"),
        *("--guidance-scale", 3, "--height", 32, "--width", 48, "--num-inference-steps", 8),
    )
    assert "SD3Transformer2DModel.transformer_blocks" in text and "wrote outputs/a_cat.png" in text
    assert Image.open("outputs/a_cat.png").size == (48, 32)
    result = invoke("--model-path", stable_diffusion3, "--prompt", "a cat", "--num-frames", 4)
    assert result.exit_code == 2 and "StableDiffusion3Pipeline takes no num_frames" in result.output
    assert "--prompt is needed" in invoke("--model-path", stable_diffusion3).output


@pytest.mark.slow
def test_two_processes(elsewhere, monkeypatch):
    """Cut in two by default, by the launcher of torch.distributed; what one raises is told in a line."""
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo")
    monkeypatch.setenv("CACHEDIT_ENABLED", "0")
    command = [sys.executable, "-m", "cachedit", "generate", "--num-gpus", "2", "--num-inference-steps", "2"]
    done = subprocess.run([*command, "--output-file-name", "x.png"], capture_output=True, text=True, timeout=200)
    assert done.returncode == 0 and done.stdout.count("wrote outputs/x.png") == 1, done.stderr
    apart = numpy.asarray(Image.open("outputs/x.png")).astype(int) - draw(2)
    assert abs(apart).max() <= 1
    failed = subprocess.run([*command, "--height", "64"], capture_output=True, text=True, timeout=200)
    assert failed.returncode == 1 and "Traceback" not in failed.stderr
    assert re.search(r"Error: process \d of 2: ValueError: the model draws 32 x 32 pictures", failed.stderr)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model-path", "nowhere"], "--prompt is needed"),
        (["--model-path", "nowhere", "--prompt", "x"], "there is no folder nowhere, and it is not a name on the hub"),
        (["--model-path", ".", "--prompt", "x"], "it has no model_index.json"),
        (["--prompt", "a red elephant"], "elephant"),
        (["--height", "64"], "the model draws 32 x 32 pictures, height=64"),
        (["--guidance-scale", "3"], "EmbeddedPipeline takes no guidance_scale"),
        (["--cache-dit-config", "nowhere.yaml"], "nowhere.yaml"),
        (["--cache-dit-config", "typo.yaml"], "cache_config: Fn_compute_block: did you mean Fn_compute_blocks?"),
        (["--cache-dit-config", "two.yaml"], "parallelism_config needs --num-gpus of 2 or more"),
        (["--cache-dit-config", "two.yaml", "--num-gpus", "3"], "must be the number of ranks, 3"),
        (["--cache-dit-config", "two.yaml", "--num-gpus", "2", "--compare"], "--compare needs a cache"),
        (["--num-gpus", "2", "--device", "cpu:0"], "--device cpu:0 is one device, but --num-gpus is 2"),
        (["--num-gpus", "0"], "--num-gpus must be at least 1, got 0"),
        (["--dtype", "float8"], "--dtype must be one of auto, float32, bfloat16, float16, got float8"),
        (["--dit-cpu-offload"], "--dit-cpu-offload needs a GPU"),
        (["--output-file-name", "x.mp4"], "x.mp4 does not fit; this pipeline draws images"),
        (["--output-file-name", "a/x.png"], "must be a name without a folder"),
    ],
)
def test_wrong_arguments(elsewhere, arguments, message):
    (elsewhere / "typo.yaml").write_text("cache_config: {Fn_compute_block: 1}")
    (elsewhere / "two.yaml").write_text("parallelism_config: {ulysses_size: 2}")
    result = invoke(*arguments)
    assert result.exit_code == 2 and message in result.output and "Traceback" not in result.output
    assert not (elsewhere / "outputs").exists()


def test_more_gpus_than_there_are(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(ValueError, match="--num-gpus 4: this machine has 2"):
        generate.run(generate.Options(num_gpus=4))


@pytest.mark.parametrize("kind", ["pil", "np"])
def test_videos_are_written(elsewhere, kind):
    frames = numpy.random.default_rng(0).random((2, 3, 16, 24, 3))
    videos = [[Image.fromarray((frame * 255).round().astype(numpy.uint8)) for frame in video] for video in frames]
    result = output.drawn(SimpleNamespace(frames=frames if kind == "np" else videos))
    paths = output.write(result, elsewhere / "out", "v.gif", fps=10)
    assert [path.name for path in paths] == ["v-0.gif", "v-1.gif"]
    for path, video in zip(paths, videos):
        read = Image.open(path)
        assert read.n_frames == 3 and read.size == (24, 16) and read.info["duration"] == 100
        assert compute_psnr(numpy.asarray(read.convert("RGB")), numpy.asarray(video[0]))[0] > 20


def test_a_video_pipeline_and_the_metrics_of_what_it_writes(elsewhere, capsys):
    """From the shell to MP4 files, with the cache and without, and back; sizes are no multiples of 16."""
    pytest.importorskip("imageio_ffmpeg", reason="MP4 needs pip install 'cachedit-kernels[video]'")
    import imageio.v3
    from transformers import T5Config, T5EncoderModel

    from cachedit.cli import metrics as command
    from pipelines import build

    pipe = build("LTXPipeline").pipe
    tokenizer = alphabet()
    t5 = T5Config(vocab_size=len(tokenizer), d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2)
    pipe.register_modules(tokenizer=tokenizer, text_encoder=T5EncoderModel(t5).eval())
    pipe.save_pretrained(elsewhere / "ltx")
    (elsewhere / "cache.yaml").write_text(
        "cache_config: {Fn_compute_blocks: 1, max_warmup_steps: 1, residual_diff_threshold: 9.0}"
    )
    sizes = ("--height", 64, "--width", 96, "--num-frames", 9, "--num-inference-steps", 4, "--fps", 12)
    text = run("--model-path", "ltx", "--prompt", "a cat", *sizes, "--cache-dit-config", "cache.yaml", "--compare")
    assert "wrote outputs/a_cat.mp4 and outputs/a_cat-plain.mp4" in text
    assert "LTXVideoTransformer3DModel.transformer_blocks" in text
    frames = list(imageio.v3.imiter("outputs/a_cat.mp4"))
    assert len(frames) == 9 and imageio.v3.immeta("outputs/a_cat.mp4")["fps"] == 12
    assert command.run(["psnr", "-v1", "outputs/a_cat-plain.mp4", "-v2", "outputs/a_cat.mp4", "-table"]) == 0
    assert "| a_cat.mp4 | 9 | " in capsys.readouterr().out


def test_frames_of_an_mp4_file_keep_their_size(elsewhere):
    pytest.importorskip("imageio_ffmpeg", reason="MP4 needs pip install 'cachedit-kernels[video]'")
    import imageio.v3

    frames = numpy.linspace(0, 1, 3 * 40 * 72 * 3).reshape(1, 3, 40, 72, 3)
    (path,) = output.write(output.drawn(SimpleNamespace(frames=frames)), elsewhere, "v", 16)
    read = list(imageio.v3.imiter(path))
    assert path.name == "v.mp4" and [frame.shape for frame in read] == [(40, 72, 3)] * 3
    assert all(compute_psnr(a, b)[0] > 25 for a, b in zip(read, (frames[0] * 255).round().astype(numpy.uint8)))


def test_what_cannot_be_written(monkeypatch):
    monkeypatch.setattr(output.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"cachedit-kernels\[video\]"):
        output.check_name("x", videos=True)
    output.check_name("x.gif", videos=True)
    with pytest.raises(ValueError, match=r"x\.png does not fit; this pipeline draws videos"):
        output.check_name("x.png", videos=True)
    with pytest.raises(ValueError, match="object holds neither images nor frames"):
        output.drawn(object())
