"""A loss far above the recent ones is named, noise and a slow rise are not, and a restart judges alike."""

import json
import random

from torchtitan_deltaproduct.titan.spikes import LEAST, LossSpikes


def test_a_spike_among_noise():
    generator, spikes = random.Random(0), LossSpikes(8.0)
    assert [spikes.observe(3 + generator.gauss(0, 0.1)) for _ in range(500)] == [""] * 500
    assert spikes.observe(3.5) == ""
    said = spikes.observe(9.0)
    assert said == "loss 9.0000 is 55.1 deviations above 3.0072, the median of the last 128 steps"
    assert spikes.observe(8.0), "one spike must not hide the next"


def test_falling_and_rising_losses_are_no_spikes():
    spikes = LossSpikes(8.0)
    assert not any(spikes.observe(10 * 0.99**step + 2) for step in range(400))
    assert not any(spikes.observe(2 + 0.002 * step) for step in range(400))


def test_too_few_losses_and_switched_off():
    spikes, off = LossSpikes(8.0), LossSpikes(0.0)
    for _ in range(LEAST - 1):
        spikes.observe(1.0)
        off.observe(1.0)
    assert spikes.observe(100.0) == "" and spikes.observe(100.0) != "" and off.observe(1e9) == off.observe(1e9) == ""


def test_losses_that_hardly_differ():
    """Their spread counts as a hundredth of a nat: neither nothing, nor much."""
    spikes = LossSpikes(8.0)
    for _ in range(LEAST):
        spikes.observe(1.0)
    assert spikes.observe(1.07) == "" and "is 20.0 deviations above 1.0000" in spikes.observe(1.2)


def test_state_round_trip():
    one, two = LossSpikes(8.0), LossSpikes(8.0)
    for step in range(200):
        one.observe(1 + 0.01 * (step % 7))
    two.load_state_dict(json.loads(json.dumps(one.state_dict())))
    assert one.observe(4.0) == two.observe(4.0) != "" and one.state_dict() == two.state_dict()
