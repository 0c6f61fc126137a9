"""Other libraries' loops on adaptive models as they are: Hugging Face's Trainer and Lightning.

    pip install transformers lightning
    python benchmarks/other_loops.py

A ViT of four blocks learns scikit-learn's digits by methods with and without loss terms, unknown to the loops. Prints
what moved in training, and what each loop's evaluation and prediction gave.
"""

import tempfile
import warnings
from typing import Any

import lightning
import timm
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, Dataset
from transformers import Trainer, TrainingArguments

import adaptvit
from adaptvit.data import open_digits

METHODS = {
    "avit": adaptvit.AViTConfig(gate_scale=4.0, gate_center=2.0, ponder_weight=0.1),
    "dynamicvit": adaptvit.DynamicViTConfig(keep_rate=0.5),
    "adavit": adaptvit.AdaViTConfig(macs_target=0.5),
    "tome": adaptvit.ToMeConfig(r=2),
}

EPOCHS = 8


class Named(Dataset):
    """Items as Trainer takes them."""

    def __init__(self, data: Dataset) -> None:
        self.data = data

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, item: int) -> dict[str, Any]:
        image, label = self.data[item]
        return {"images": image, "labels": label}


class WithLoss(Trainer):
    """A Trainer that knows logits alone."""

    def compute_loss(self, model: nn.Module, inputs: dict[str, Tensor], return_outputs: bool = False, **_: Any) -> Any:
        logits = model(inputs["images"])
        loss = cross_entropy(logits, inputs["labels"])
        return (loss, {"logits": logits}) if return_outputs else loss


class Plain(lightning.LightningModule):
    """A module that knows logits alone while it trains, and predicts in detail."""

    def __init__(self, model: adaptvit.AdaptiveViT) -> None:
        super().__init__()
        self.model = model

    def training_step(self, batch: Any, _: int) -> Any:
        images, labels = batch
        logits = self.model(images)
        return {"loss": cross_entropy(logits, labels), "logits": logits}

    def validation_step(self, batch: Any, _: int) -> Any:
        images, labels = batch
        output = self.model(images, detailed=True)
        self.log("accuracy", (output.logits.argmax(dim=1) == labels).float().mean(), on_epoch=True)
        self.log("share", output.usage.share.mean().float(), on_epoch=True)
        return output

    def predict_step(self, batch: Any, _: int) -> Any:
        return self.model(batch[0], detailed=True)

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters(), lr=1e-3)


def build(config: Any) -> adaptvit.AdaptiveViT:
    torch.manual_seed(0)
    vit = timm.create_model("vit_tiny_patch16_224", img_size=32, patch_size=4, depth=4, num_classes=10, in_chans=1)
    return config.build(vit)


def moved(model: adaptvit.AdaptiveViT, before: dict[str, Tensor]) -> str:
    own = {name for name, _ in model.named_parameters() if not name.startswith("vit.")}
    now = model.state_dict()
    far = [name for name in before if not torch.equal(before[name], now[name])]
    return f"{len(far)} of {len(before)} tensors moved, {len(own & {*far})} of the method's own {len(own)}"


def main() -> None:
    warnings.simplefilter("ignore")
    data = open_digits(32)
    for name, config in METHODS.items():
        with tempfile.TemporaryDirectory() as folder:
            model = build(config)
            before = {key: value.clone() for key, value in model.state_dict().items()}
            arguments = TrainingArguments(
                folder,
                num_train_epochs=EPOCHS,
                per_device_train_batch_size=64,
                per_device_eval_batch_size=64,
                use_cpu=True,
                report_to=[],
                save_strategy="no",
                label_names=["labels"],
                remove_unused_columns=False,
                disable_tqdm=True,
                learning_rate=1e-3,
            )
            trainer = WithLoss(model, arguments, train_dataset=Named(data.train), eval_dataset=Named(data.test))
            trainer.train()
            answers = trainer.predict(Named(data.test))
            right = (answers.predictions.argmax(axis=1) == answers.label_ids).mean()
            loss = trainer.evaluate()["eval_loss"]
            print(f"{name:11} Trainer    {moved(model, before)}; test loss {loss:.3f}, {right:.1%} right")
            trainer.save_model(folder)

            model = build(config)
            train, test = (DataLoader(part, 64, shuffle=part is data.train) for part in (data.train, data.test))
            runner = lightning.Trainer(
                max_epochs=EPOCHS,
                accelerator="cpu",
                logger=False,
                enable_checkpointing=False,
                enable_progress_bar=False,
                enable_model_summary=False,
            )
            module = Plain(model)
            runner.fit(module, train, test)
            (figures,) = runner.validate(module, test, verbose=False)
            outputs = runner.predict(module, test)
            usage = adaptvit.join([output.usage for output in outputs])
            shares = f"{figures['share']:.1%} of the MACs, predicted {len(usage.attended)} at {usage.share.mean():.1%}"
            told = f"{moved(model, before)}; {figures['accuracy']:.1%} right at {shares}"
            print(f"{name:11} Lightning  {told}", flush=True)


if __name__ == "__main__":
    main()
