"""Training: a few steps run, resume and log; the schedule; nothing held out is drawn."""

import csv
import random

import pytest
import torch

from cachedit.embedded import train
from cachedit.embedded.pipeline import EmbeddedPipeline

COMMON = [
    "--batch",
    "4",
    "--threads",
    "1",
    "--no-compile",
    "--log-every",
    "1",
    "--save-every",
    "2",
    "--check-every",
    "0",
]


@pytest.fixture(autouse=True)
def small(monkeypatch):
    monkeypatch.setattr(train, "HELD_OUT_BATCH", 4)
    monkeypatch.setattr(train, "CONFIG", {**train.CONFIG, "num_layers": 1, "num_single_layers": 1})
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def rows(path):
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_resuming_gives_what_an_uninterrupted_run_gives(tmp_path):
    halfway = tmp_path / "halfway"
    train.main(["--out", str(halfway), "--steps", "2", "--decay-share", "0", *COMMON])
    train.main(["--out", str(halfway), "--steps", "4", "--decay-share", "0", "--resume", *COMMON])
    train.main(["--out", str(tmp_path / "straight"), "--steps", "4", "--decay-share", "0", *COMMON])
    first, second = (torch.load(tmp_path / name / "state.pt", weights_only=False) for name in ("halfway", "straight"))
    assert all(torch.equal(first["average"][name], second["average"][name]) for name in first["average"])
    log = rows(halfway / "log.csv")
    assert [int(row["step"]) for row in log] == [1, 2, 3, 4]
    assert [row["loss"] for row in log] == [row["loss"] for row in rows(tmp_path / "straight" / "log.csv")]
    seconds = [float(row["seconds"]) for row in log]
    assert seconds == sorted(seconds) and log[-1]["held_out_loss"]
    assert isinstance(EmbeddedPipeline.from_pretrained(halfway / "pipeline"), EmbeddedPipeline)


def test_learning_rate():
    rates = [train.learning_rate(step, 1000, 1.0, 100, 0.4) for step in range(1000)]
    assert rates[0] == pytest.approx(0.01) and rates[99] == rates[599] == 1.0
    assert rates[800] == pytest.approx(0.5) and 0 < rates[999] < 0.01


def test_training_attention_equals_the_stock_one():
    torch.manual_seed(0)
    model = train.build_transformer()
    for parameter in model.parameters():  # wake up what starts at zero
        torch.nn.init.normal_(parameter, std=0.05)
    batch = train.batch_of(random.Random(0), torch.Generator().manual_seed(0), 2, "train")
    stock = train.flow_loss(model, batch, train.image_ids(), train.text_ids())
    for module in model.modules():
        if hasattr(module, "set_processor"):
            module.set_processor(train.TrainingAttention())
    own = train.flow_loss(model, batch, train.image_ids(), train.text_ids())
    assert own.item() == pytest.approx(stock.item(), rel=1e-3)


def test_an_untrained_network_predicts_nothing():
    model = train.build_transformer()
    clean, noise, times, tokens, pooled = train.batch_of(random.Random(0), torch.Generator().manual_seed(0), 2, "train")
    assert clean.shape == (2, 64, 48) and clean.min() >= -1 and clean.max() <= 1
    out = model(
        hidden_states=noise, encoder_hidden_states=tokens, pooled_projections=pooled, timestep=times,
        img_ids=train.image_ids(), txt_ids=train.text_ids(), return_dict=False,
    )[0]  # fmt: skip
    assert torch.equal(out, torch.zeros_like(out))
