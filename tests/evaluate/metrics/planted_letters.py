"""Words with a direction for their first letter, and dictionaries with planted absorption and feature splitting."""

import math

import torch

from sae.evaluate.metrics.absorption import Absorption
from sae.evaluate.metrics.first_letter import LETTERS, SpellingRows
from sae.evaluate.metrics.letter_probes import LetterProbes
from sae.train.activation_functions import ReLU
from sae.train.sae import SAE

TRAIN, TEST = 32, 8  # number of planted words per letter
PLANTED = Absorption(k_sparse_probe_batch_size=52, k_sparse_probe_num_epochs=20, k_sparse_probe_l1_decay=0.1)


def planted(
    absorbed: dict[str, int], *, share: float = 1.0, split: str = "", train: int = TRAIN, test: int = TEST
) -> tuple[SpellingRows, SAE]:
    """Words and a dictionary with a latent per letter. A word is the sum of its letter's direction and one of its own.

    `absorbed` maps a letter to a number of words: so many test words of this letter, and four times as many training
    words, have their own latent, which takes `share` of the letter's projection from the letter's latent. The letters
    in `split` have two latents. If no letter is split, latent i is that of letter i. Each letter has `train` training
    words and `test` test words.
    """
    letter = torch.arange(26).repeat_interleave(train + test)
    number = torch.arange(train + test).repeat(26)
    n = len(letter)
    x = torch.zeros(n, 26 + n + 1)
    x[torch.arange(n), letter] = 1
    x[torch.arange(n), 26 + torch.arange(n)] = 1
    x[:, -1] = torch.where(number % 2 == 0, 1, -1) * torch.isin(letter, torch.tensor([LETTERS.index(c) for c in split]))
    is_train = number < train
    swallowed = [
        i
        for i in range(n)
        if (own := absorbed.get(LETTERS[letter[i]], 0)) and (number[i] < 4 * own or train <= number[i] < train + own)
    ]
    latents: list[tuple[torch.Tensor, float, torch.Tensor]] = []  # encoder, bias, decoder
    for at in range(26):
        direction = torch.zeros(x.shape[1])
        direction[at] = 1
        encoder = direction.clone()
        for i in swallowed:
            if letter[i] == at:
                encoder[26 + i] = -share
        if LETTERS[at] in split:
            for sign in (1, -1):
                side = torch.zeros(x.shape[1])
                side[-1] = sign
                latents.append((encoder + side, -1.0, direction))
        else:
            latents.append((encoder, 0.0, direction))
    for i in swallowed:
        own = torch.zeros(x.shape[1])
        own[26 + i] = 1
        both = own.clone()
        both[letter[i]] = 1
        latents.append((own * share * math.sqrt(2), 0.0, both / math.sqrt(2)))
    sae = SAE(x.shape[1], len(latents), [ReLU()]).requires_grad_(False)
    for index, (encoder, bias, decoder) in enumerate(latents):
        sae.W_enc[:, index], sae.b_enc[index], sae.W_dec[index] = encoder, bias, decoder
    probe = LetterProbes(torch.eye(26, x.shape[1]) * 3, torch.full((26,), -1.5))
    x_test = x[~is_train]
    return SpellingRows(x[is_train], letter[is_train], x_test, letter[~is_train], x_test.clone(), probe), sae
