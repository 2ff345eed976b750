"""What a student is told to come close to: a teacher's predictions, or what its blocks put out.

All of it in float32 and summed over tokens, so that a batch may come in pieces of any size. Each is zero, with no
gradient, where student and teacher agree.
"""

from __future__ import annotations

from torch import Tensor
from torch.nn.functional import cosine_similarity, kl_div, log_softmax


def forward_kl(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """T^2 KL(softmax(t/T) || softmax(z/T)) in nats, summed over tokens, for logits z, t [tokens, vocabulary].

    The student is to put probability wherever the teacher does. T^2 keeps gradients of the same size whatever the
    temperature T. Hinton et al. 2015, arXiv:1503.02531, section 2.
    """
    mine = log_softmax(student.float() / temperature, dim=-1)
    theirs = log_softmax(teacher.float() / temperature, dim=-1)
    return temperature**2 * kl_div(mine, theirs, reduction="sum", log_target=True)


def reverse_kl(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """T^2 KL(softmax(z/T) || softmax(t/T)), as above with the two exchanged.

    The student is to put probability nowhere that the teacher does not. Gu et al. 2023 (MiniLLM), arXiv:2306.08543,
    take it over texts that the student writes; here it is over the tokens of given ones.
    """
    return forward_kl(teacher, student, temperature)


def squared_distance(student: Tensor, teacher: Tensor) -> Tensor:
    """Mean over features of (s - t)^2, summed over tokens, for activations [tokens, features]."""
    return (student.float() - teacher.float()).square().mean(-1).sum()


def cosine_distance(student: Tensor, teacher: Tensor) -> Tensor:
    """1 - cos(s, t), summed over tokens, for activations [tokens, features]: of the directions alone."""
    return (1 - cosine_similarity(student.float(), teacher.float(), dim=-1)).sum()
