"""Scores and pictures of a model on fixed noise: the same (prompt, seed) pairs for every model.

    python eval.py --lora RUN --prompt "a cat washing dishes"     # base and LoRA side by side
"""

import torch

import runs
from ddim_logprob import denoise, keyed_generator


@torch.no_grad()
def evaluate(model, reward, prompts, each, args, judge=None, rank=0, world=1):
    """Score `each` pictures of every prompt, drawn from noise keyed by (prompt, number) alone.

    The noise is the same for every model, method and training seed, so scores can be compared in
    pairs. Processes share the work. Returns {"score": list of n, "recognised": list of n or None}
    and, in this process, the first picture of each of its prompts (m, 3, H, W).
    """
    owners = [(prompt, k) for k in range(each) for prompt in prompts]
    scores, recognised, firsts = torch.zeros(len(owners)), torch.zeros(len(owners)), []
    for at in torch.arange(rank, len(owners), world).split(args.sample_batch):
        text = [owners[j][0] for j in at.tolist()]
        generators = [keyed_generator("evaluation", *owners[j]) for j in at.tolist()]
        x_T = torch.stack([torch.randn(model.latent_shape, generator=g) for g in generators])
        x_0 = denoise(model.unet, model.schedule, x_T.to(model.device), args.T, 0,
                      model.embed(text), model.embed([""]), args.guidance, generators)  # fmt: skip
        images = model.decode(x_0, args.decode_batch)
        scores[at] = reward(images, text)
        if judge:
            recognised[at] = judge(images, text).float()
        firsts.append(images[at < len(prompts)])
    scores, recognised = (runs.all_sum(v, model.device).tolist() for v in (scores, recognised))
    return {"score": scores, "recognised": recognised if judge else None}, torch.cat(firsts)
