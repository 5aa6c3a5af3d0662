"""Bringing a member up to date: all of the source's state, bit for bit, or nothing of it."""

from __future__ import annotations

import pytest
import torch

from raysegment.climate.channels import NAMES
from raysegment.elastic import sync
from raysegment.learning.exchange import Interrupted
from raysegment.learning.normalise import Normaliser
from raysegment.learning.optim import OptimConfig
from raysegment.learning.state import capture
from raysegment.learning.step import LearnConfig, Learner, initialise
from raysegment.networks import NetworkConfig, TiramisuConfig


class Giver:
    """The source's group: remembers what is broadcast."""

    rank = 0

    def __init__(self):
        self.said = []

    def broadcast(self, tensor, source):
        self.said.append(tensor.clone())


class Receiver:
    """The group of a member that is brought up to date; the source dies before it has said all but the first `most`."""

    rank = 1

    def __init__(self, said, most):
        self.said, self.most, self.heard = said, most, 0

    def broadcast(self, tensor, source):
        if self.heard == self.most:
            raise Interrupted("the source is gone")
        tensor.copy_(self.said[self.heard])
        self.heard += 1


def learner(seed):
    network = NetworkConfig(channels=4, tiramisu=TiramisuConfig(first=8, growth=4, kernel=3, blocks=(1, 1)))
    config = LearnConfig(global_batch=2, micro_batch=1, lag=1, optim=OptimConfig(ema=0.9))
    made = Learner(initialise(network, seed), config, Normaliser.of([0.0] * 16, [1.0] * 16, NAMES[:4]), (1.0, 1.0, 1.0))
    for vector in made.optimizer.vectors().values():
        vector.uniform_()
    return made


def all_of(one):
    state = capture(one)
    return {**state.weights, **state.tensors}, state.facts


def same(one, other):
    (tensors, facts), (others, said) = one, other
    return facts == said and tensors.keys() == others.keys() and all(torch.equal(tensors[k], others[k]) for k in tensors)


def test_all_or_nothing_arrives():
    source, giver = learner(1), Giver()
    source.step = source.committed = 9
    source.lagged = torch.randn_like(source.flat.values)
    sync._pass_on(source, giver, giver=True)
    for most in range(len(giver.said)):
        member = learner(2)
        before = all_of(member)
        with pytest.raises(Interrupted):
            sync._pass_on(member, Receiver(giver.said, most), giver=False)
        assert same(all_of(member), before), f"changed after {most} of {len(giver.said)} messages"
    member = learner(2)
    assert not same(all_of(member), all_of(source))
    assert sync._pass_on(member, Receiver(giver.said, len(giver.said)), giver=False) > 0
    assert same(all_of(member), all_of(source))
