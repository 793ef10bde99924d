"""Rewards r(x_0, c): how well a picture matches its prompt (Sec. 4.1, "Rewards").

A reward is a function of pictures (B, 3, H, W), float32 in [0, 1], and B prompts; it returns B
numbers, higher is better. `load_reward` makes one from its name.
"""

import torch

from runs import Stop

# Sec. 4.1: ViT-H-14 CLIP; the weights are the authors' choice [official].
CLIP_SD = ("ViT-H-14", "laion2b_s32b_b79k")
REWARDS = ("clip",)


class ClipScore:
    """Cosine similarity of CLIP's picture and text embeddings, in [-1, 1] (Sec. 4.1 (2)).

    `name`, `pretrained` go to `open_clip.create_model_and_transforms`. The text embedding of a
    prompt is computed once. `device` may be changed with `.to` while the UNet needs the memory.
    """

    def __init__(self, name=CLIP_SD[0], pretrained=CLIP_SD[1], device="cpu", dtype=torch.float32):
        import open_clip

        self.model, _, self.transform = open_clip.create_model_and_transforms(
            name, pretrained=pretrained, device=device
        )
        self.model.eval().requires_grad_(False).to(dtype)
        self.tokenizer = open_clip.get_tokenizer(name)
        self.device, self.dtype, self.text = torch.device(device), dtype, {}

    def to(self, device):
        self.model.to(device)
        self.device = torch.device(device)
        return self

    @torch.no_grad()
    def embed_text(self, prompts):
        """B prompts -> unit embeddings (B, d) float32 on the CPU."""
        new = sorted(set(prompts) - self.text.keys())
        if new:
            out = self.model.encode_text(self.tokenizer(new).to(self.device), normalize=True)
            self.text.update(zip(new, out.float().cpu()))
        return torch.stack([self.text[p] for p in prompts])

    @torch.no_grad()
    def embed_images(self, images, normalize=True):
        """(B, 3, H, W) in [0, 1] -> embeddings (B, d) float32 on the CPU, CLIP's own transform."""
        from torchvision.transforms.functional import to_pil_image

        # open_clip's transform works on PIL pictures, as they would be saved: 8 bits a channel.
        x = torch.stack([self.transform(to_pil_image(image.cpu())) for image in images])
        out = self.model.encode_image(x.to(self.device, self.dtype), normalize=normalize)
        return out.float().cpu()

    def __call__(self, images, prompts):
        return (self.embed_images(images) * self.embed_text(prompts)).sum(1)


def checked(reward, name):
    """`reward`, with its answer checked: a (B,) float32 CPU tensor of finite numbers.

    Raises `runs.Stop` naming the reward and, for NaN or infinity, the prompt.
    """

    def call(images, prompts):
        scores = torch.as_tensor(reward(images, prompts)).detach().float().cpu()
        if scores.shape != (len(prompts),):
            raise Stop(
                f"reward {name} returned shape {tuple(scores.shape)} for {len(prompts)} pictures: "
                f"it must return one number a picture"
            )
        bad = (~scores.isfinite()).nonzero().flatten().tolist()
        if bad:
            raise Stop(
                f"reward {name} returned {scores[bad[0]]} for the prompt {prompts[bad[0]]!r}"
            )
        return scores

    call.model = reward
    return call


def load_reward(name, tiny=None, device="cpu", dtype=torch.float32):
    """The reward called `name`; `tiny` is the bundled model's folder if that is being trained."""
    assert name in REWARDS, name
    if tiny is not None:
        return checked(ClipScore(f"local-dir:{tiny}/clip", None, device), name)
    return checked(ClipScore(device=device, dtype=dtype), name)
