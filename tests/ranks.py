"""Ranks for tests: threads of one process, each with a model and connected by gloo, and jobs that ranks share."""

import threading
from datetime import timedelta

import numpy as np
import torch as th
from stable_baselines3.common.buffers import ReplayBuffer, RolloutBuffer
from stable_baselines3.common.type_aliases import ReplayBufferSamples
from stable_baselines3.common.vec_env import DummyVecEnv
from torch import distributed as dist

from sb3_resnet.callbacks import AMPCallback, DataParallelCallback, LRScheduleCallback, UnfreezeCallback
from sb3_resnet.common.ranks import Ranks
from tests.helpers import TinyGame, make_actor_critic, make_model

#: Batch of one rank.
BATCH = 4
#: Threads have their random numbers in common, and models are to begin with the same weights.
_BUILDING = threading.Lock()


class ThreadRanks(Ranks):
    """Its groups are in no registry of PyTorch's."""

    def close(self):
        self.after_average.clear()

    @property
    def group(self):
        return self._control


def in_threads(monkeypatch, act, size=2, timeout=20.0):
    """
    Run ``act(rank)`` once per rank, at the same time.

    :return: by rank, what it returned or the error that it raised
    """
    done = [None] * size
    local = connected_by_threads(monkeypatch, size, timeout)

    def run(rank):
        local.rank, local.groups = rank, 0
        try:
            done[rank] = act(rank)
        except BaseException as error:
            done[rank] = error

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return done


def connected_by_threads(monkeypatch, size, timeout):
    """Let ``connect()`` find the other threads; each writes its ``rank`` and ``groups = 0`` into what is returned."""
    store, local = dist.HashStore(), threading.local()

    def connect(device, given_timeout):
        local.groups += 1
        prefix = dist.PrefixStore(str(local.groups), store)
        patience = min(timeout, given_timeout)
        group = dist.ProcessGroupGloo(prefix, local.rank, size, timedelta(seconds=patience))
        # PyTorch 2.7 looks here for the ranks of a group that is told who sends.
        ranks = {rank: rank for rank in range(size)}
        monkeypatch.setitem(dist.distributed_c10d._world.pg_group_ranks, group, ranks)
        return ThreadRanks(local.rank, size, group, group, patience)

    monkeypatch.setattr("sb3_resnet.common.ranks.connect", connect)
    # PyTorch 2.7 asks the default group, which threads do not have, who sends.
    monkeypatch.setattr(dist.distributed_c10d, "get_rank", lambda group=None: local.rank)
    return local


def results(done):
    """What the ranks returned, if none raised an error."""
    for one in done:
        if isinstance(one, BaseException):
            raise one
    return done


class PairedReplay(ReplayBuffer):
    """A batch has as many transitions of each environment; which ones depends on the update alone."""

    identities = (0,)
    sampled = 0

    def sample(self, batch_size, env=None):
        self.sampled += 1
        rows, columns = [], []
        for column, identity in enumerate(self.identities):
            rng = np.random.default_rng([self.sampled, identity])
            rows += rng.integers(0, self.pos, batch_size // self.n_envs).tolist()
            columns += [column] * (batch_size // self.n_envs)
        take = (np.array(rows), np.array(columns))
        parts = (self.observations, self.actions, self.next_observations, self.dones, self.rewards)
        batch = [self.to_torch(part[take].reshape(len(rows), *part.shape[2:])) for part in parts]
        batch[3:] = [part.reshape(-1, 1) for part in batch[3:]]
        return ReplayBufferSamples(*batch)


class PairedRollout(RolloutBuffer):
    """A minibatch has as many steps of each environment, in their order."""

    def get(self, batch_size=None):
        next(super().get())  # arranges the arrays
        rows = batch_size // self.n_envs
        for start in range(0, self.buffer_size, rows):
            columns = range(self.n_envs)
            yield self._get_samples(
                np.concatenate([column * self.buffer_size + np.arange(start, start + rows) for column in columns])
            )


def model_of(algorithm, identities, **kwargs):
    """A model with one environment per identity, and memory that depends on the identities alone."""
    with _BUILDING:
        return _model_of(algorithm, identities, **kwargs)


def _model_of(algorithm, identities, **kwargs):
    envs = DummyVecEnv([lambda: TinyGame((4, 32, 32)) for _ in identities])
    if algorithm == "ppo":
        batch = BATCH * len(identities)
        options = {"batch_size": batch, "normalize_advantage": False, "rollout_buffer_class": PairedRollout, **kwargs}
        model = make_actor_critic("ppo", envs, **options)
        model._setup_learn(1, None)
        return model
    extractor = {"backbone": "resnet_mini", **kwargs.pop("extractor", {})}
    options = {"batch_size": BATCH * len(identities), "replay_buffer_class": PairedReplay, **kwargs}
    model = make_model(algorithm, envs, extractor=extractor, **options)
    buffer = model.replay_buffer
    buffer.identities = identities
    for column, identity in enumerate(identities):
        rng = np.random.default_rng(identity)
        for images in (buffer.observations, buffer.next_observations):
            images[:64, column] = rng.integers(0, 256, images[:64, column].shape)
        buffer.actions[:64, column] = rng.integers(0, 3, (64, 1))
        buffer.rewards[:64, column] = rng.normal(size=64)
    buffer.pos = 64
    model._setup_learn(1, None)
    return model


def new_rollout(model, identities, number):
    """What an on-policy model has collected before its update of this number."""
    buffer = model.rollout_buffer
    buffer.reset()
    for column, identity in enumerate(identities):
        rng = np.random.default_rng([number, identity])
        buffer.observations[:, column] = rng.integers(0, 256, buffer.observations[:, column].shape)
        buffer.actions[:, column] = rng.integers(0, 3, buffer.actions[:, column].shape)
        for values in (buffer.values, buffer.advantages, buffer.returns):
            values[:, column] = rng.normal(size=buffer.buffer_size)
        buffer.log_probs[:, column] = np.log(1 / 3) + 0.1 * rng.normal(size=buffer.buffer_size)
    buffer.full = True


def train_on(identities, algorithm="dqn", rounds=200, overflow=None, timesteps=800, **kwargs):
    """
    Train without environments: phases by timestep, a schedule, float16, and the target network's interval.

    :param identities: whose data to train on; one per rank, or all of them in one process
    :param overflow: ``(identity, update)``: whose gradient becomes infinite when
    :return: the model
    """
    model = model_of(algorithm, identities, **kwargs)
    n_envs = len(identities)
    # The joint process takes twice the timesteps in each rollout, as the ranks do together.
    used = [
        DataParallelCallback(timeout=60),
        UnfreezeCallback([{"at_timestep": timesteps, "unfreeze_from": "layer4", "ramp": 20}], verbose=0),
        LRScheduleCallback(5, "cosine", decay_steps=400),
        *([AMPCallback("float16", verbose=0, init_scale=2.0**10)] if overflow else []),
    ]
    for callback in used:
        callback.init_callback(model)
    for callback in used:
        callback.on_training_start({}, {})
    update = _poison(model, overflow) if overflow and overflow[0] in identities else [0]
    for update[0] in range(rounds):
        model.num_timesteps += 4 * n_envs
        if algorithm == "ppo":
            new_rollout(model, identities, update[0])
        for callback in used:
            callback.on_rollout_end()
        if algorithm == "ppo":
            model.train()
        else:
            model.train(gradient_steps=1, batch_size=BATCH * n_envs)
            for _ in range(4):
                model._on_step()
    for callback in used:
        callback.on_training_end()
    return model


def _poison(model, overflow):
    update = [0]
    parameter = [*model.policy.trained.parameters()][-1]
    parameter.register_hook(lambda gradient: gradient * float("inf") if update[0] == overflow[1] else gradient)
    return update


def values_of(model):
    """Parameters, buffers and moments, by name."""
    moments = model.policy.optimizer.state_dict()["state"]
    return {
        **{name: value.detach().clone() for name, value in model.policy.state_dict().items()},
        **{f"{index}.{key}": th.as_tensor(value) for index, one in moments.items() for key, value in one.items()},
    }
