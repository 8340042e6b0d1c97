"""What is attached to a model beside its weights, and the frame in which a model was trained.

An adapter (`methods/adapters.py`) computes in forward hooks, of which the model knows nothing. This
file remembers which model has one, so that generation can frame a text as in training.
"""

from weakref import WeakKeyDictionary

from torch import nn

# models that compute with an adapter: the adapter, and the handles that remove its hooks
ATTACHED: WeakKeyDictionary[nn.Module, tuple[nn.Module, list]] = WeakKeyDictionary()


def adapter_of(model: nn.Module) -> nn.Module | None:
    """The adapter that is attached to the model."""
    return ATTACHED[model][0] if model in ATTACHED else None


def check_free(model: nn.Module) -> None:
    """ValueError if an adapter is attached to the model."""
    if adapter_of(model) is not None:
        raise ValueError("the model has an adapter already: detach it first")


def frame_of(model: nn.Module, prefix=None) -> tuple[str, int | None]:
    """The frame that was trained, (linearisation, max_source): of the prefix, or else the adapter
    that is attached to the model, or else the model; ("", None) = none."""
    learned = prefix or adapter_of(model)
    if learned is None or not (learned.linearisation or prefix):
        learned = model.config
    return learned.linearisation, learned.max_source
