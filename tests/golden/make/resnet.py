"""Golden ResNets: torchvision, timm, and the CIFAR networks of three continual-learning and CIFAR codes.

python tests/golden/make/resnet.py SOURCES      # SOURCES holds checkouts: pycil/ mammoth/ cifar10/
"""

import sys
import types
from pathlib import Path

import timm
import torch
import torchvision
from common import save_case, save_keys, seeded
from timm.models.resnet import Bottleneck
from timm.models.resnet import ResNet as TimmResNet
from torch import nn
from torchvision.models import resnet as tv

torch.set_num_threads(1)
SOURCES = Path(sys.argv[1])
for folder in ("pycil", "mammoth", "cifar10"):
    sys.path.insert(0, str(SOURCES / folder))


class SmallTorchvision(tv.ResNet):
    """torchvision's network with narrow stages (its own are fixed at 64 to 512)."""

    def __init__(self, block, layers, planes, stem, classes):
        nn.Module.__init__(self)
        self._norm_layer, self.dilation, self.groups, self.base_width = nn.BatchNorm2d, 1, 1, 64
        self.inplanes = stem
        self.conv1 = nn.Conv2d(3, stem, kernel_size=7, stride=2, padding=3, bias=False)
        self.bn1, self.relu = nn.BatchNorm2d(stem), nn.ReLU(inplace=True)
        self.maxpool = nn.MaxPool2d(kernel_size=3, stride=2, padding=1)
        for i, (n, p) in enumerate(zip(layers, planes, strict=True), start=1):
            setattr(self, f"layer{i}", self._make_layer(block, p, n, stride=1 if i == 1 else 2))
        self.avgpool = nn.AdaptiveAvgPool2d((1, 1))
        self.fc = nn.Linear(planes[-1] * block.expansion, classes)


def outputs(model, x, stages, head):
    """Features by forward hooks, in evaluation and in training, and the statistics after one training step."""
    found = {}

    def run(prefix):
        hooks = [
            getattr(model, s).register_forward_hook(
                lambda m, i, o, k=f"{prefix}stage{n}": found.__setitem__(k, o.permute(0, 2, 3, 1).clone())
            )
            for n, s in enumerate(stages)
        ]
        hooks.append(
            getattr(model, head).register_forward_hook(
                lambda m, i, o: found.update({f"{prefix}pooled": i[0].clone(), f"{prefix}logits": o.clone()})
            )
        )
        with torch.no_grad():
            out = model(x)
            if isinstance(out, dict):  # PyCIL's networks stop at the features
                found[f"{prefix}pooled"] = out["features"]
        for hook in hooks:
            hook.remove()

    model.eval()
    run("")
    before = {k: v.clone() for k, v in model.state_dict().items()}
    model.train()
    run("train.")
    for key, value in model.state_dict().items():
        if key.endswith(("running_mean", "running_var")):
            found[f"stats.{key}"] = value.clone()
    model.load_state_dict(before)
    return found


def save(name, model, size, call, library, stages=("layer1", "layer2", "layer3", "layer4"), head="fc", config=None):
    """One case."""
    model = seeded(model)
    x = torch.randn(3, 3, *size, generator=torch.Generator().manual_seed(1))
    made = outputs(model, x, stages, head)
    save_case(name, model.state_dict(), config, {"x": x.permute(0, 2, 3, 1)}, made, call, library)


def main():
    """Writes the cases and key lists."""
    basic = SmallTorchvision(tv.BasicBlock, [2, 1, 2, 1], (6, 8, 10, 12), 5, 7)
    save("resnet_torchvision_basic", basic, (33, 38), "torchvision ResNet, BasicBlock, planes 6 8 10 12", "torchvision")
    bottle = SmallTorchvision(tv.Bottleneck, [1, 2, 1, 1], (3, 4, 5, 6), 7, 5)
    save("resnet_torchvision_bottleneck", bottle, (40, 40), "torchvision ResNet, Bottleneck", "torchvision")
    square = SmallTorchvision(tv.BasicBlock, [1, 2, 1, 1], (6, 6, 6, 6), 6, 6)
    save("resnet_torchvision_square", square, (33, 33), "torchvision ResNet, every width 6", "torchvision")
    deep = TimmResNet(Bottleneck, (1, 2, 1, 1), num_classes=5, stem_width=4, stem_type="deep", avg_down=True,
                      channels=(3, 4, 5, 6))  # fmt: skip
    config = {"architecture": "resnet50d", "num_classes": 5, "pretrained_cfg": {
        "input_size": [3, 288, 288], "interpolation": "bicubic", "crop_pct": 0.95, "mean": [0.485, 0.456, 0.406],
        "std": [0.229, 0.224, 0.225]}}  # fmt: skip
    save("resnet_timm_d", deep, (42, 46), "timm ResNet(Bottleneck, deep stem, avg_down)", "timm", config=config)

    from convs.cifar_resnet import CifarResNet, ResNetBasicblock
    from convs.resnet import BasicBlock as PycilBlock
    from convs.resnet import ResNet as PycilResNet

    class SmallPycil(CifarResNet):
        """PyCIL's CIFAR network with narrow stages."""

        def __init__(self):
            nn.Module.__init__(self)
            self.conv_1_3x3, self.bn_1 = nn.Conv2d(3, 5, 3, 1, 1, bias=False), nn.BatchNorm2d(5)
            self.inplanes = 5
            self.stage_1 = self._make_layer(ResNetBasicblock, 5, 2, 1)
            self.stage_2 = self._make_layer(ResNetBasicblock, 10, 2, 2)
            self.stage_3 = self._make_layer(ResNetBasicblock, 20, 1, 2)
            self.avgpool = nn.AvgPool2d(8)
            self.fc = nn.Linear(20, 4)

    stages = ("stage_1", "stage_2", "stage_3")
    save("resnet_pycil", SmallPycil(), (32, 32), "PyCIL CifarResNet, planes 5 10 20", (), stages)

    class SmallPycil18(PycilResNet):
        """PyCIL's ResNet-18 for CIFAR with narrow stages."""

        def __init__(self):
            nn.Module.__init__(self)
            self._norm_layer, self.dilation, self.groups, self.base_width = nn.BatchNorm2d, 1, 1, 64
            self.inplanes = 4
            self.conv1 = nn.Sequential(nn.Conv2d(3, 4, 3, 1, 1, bias=False), nn.BatchNorm2d(4), nn.ReLU(inplace=True))
            for i, p in enumerate((4, 6, 8, 10), start=1):
                setattr(self, f"layer{i}", self._make_layer(PycilBlock, p, 2, stride=1 if i == 1 else 2))
            self.avgpool = nn.AdaptiveAvgPool2d((1, 1))
            self.fc = nn.Linear(10, 3)

    save("resnet_pycil18", SmallPycil18(), (17, 17), "PyCIL ResNet (CIFAR stem), planes 4 6 8 10", ())

    # mammoth's backbone package registers everything it has; the network needs only these two names of it
    package = types.ModuleType("backbone")
    package.MammothBackbone, package.register_backbone = nn.Module, lambda *a, **k: lambda f: f
    package.__path__ = [str(SOURCES / "mammoth" / "backbone")]
    sys.modules["backbone"] = package
    from backbone.ResNetBlock import BasicBlock as MammothBlock
    from backbone.ResNetBlock import ResNet as MammothResNet

    four = ("layer1", "layer2", "layer3", "layer4")
    mammoth = MammothResNet(MammothBlock, [2, 2, 2, 2], 6, 3)
    save("resnet_mammoth", mammoth, (16, 16), "mammoth ResNet, nf=3", (), four, "classifier")

    import resnet as cifar10

    class SmallCifar(cifar10.ResNet):
        """The CIFAR-10 network with narrow stages."""

        def __init__(self):
            nn.Module.__init__(self)
            self.in_planes = 4
            self.conv1, self.bn1 = nn.Conv2d(3, 4, 3, 1, 1, bias=False), nn.BatchNorm2d(4)
            self.layer1 = self._make_layer(cifar10.BasicBlock, 4, 2, stride=1)
            self.layer2 = self._make_layer(SmallBlock, 8, 1, stride=2)
            self.layer3 = self._make_layer(SmallBlock, 16, 2, stride=2)
            self.linear = nn.Linear(16, 5)

    class SmallBlock(cifar10.BasicBlock):
        """Its block (option A pads by a fourth of the new width on each side)."""

    save(
        "resnet_cifar10", SmallCifar(), (16, 16), "pytorch_resnet_cifar10 ResNet, planes 4 8 16", (), four[:3], "linear"
    )

    meta = torch.device("meta")
    paper = "torchvision's documentation, Num. Params"
    for depth, total in ((18, 11689512), (34, 21797672), (50, 25557032), (101, 44549160), (152, 60192808)):
        with meta:
            model = getattr(torchvision.models, f"resnet{depth}")()
            save_keys(f"torchvision-resnet{depth}", "torchvision-resnet", model, None, total, paper)
    with meta:
        model = timm.create_model("resnet50d")
        cfg = {"architecture": "resnet50d", "pretrained_cfg": {"input_size": [3, 224, 224]}}
        save_keys("timm-resnet50d", "torchvision-resnet", model, cfg, 25576264, "timm results: 25.58 M")
        model = MammothResNet(MammothBlock, [2, 2, 2, 2], 100, 64)
        save_keys("mammoth-resnet18", "cifar-resnet", model, None, 11220132, "counted by the reference: 11.2 M")
        for depth, total in ((20, 269722), (32, 464154), (56, 853018)):
            model = getattr(cifar10, f"resnet{depth}")()
            save_keys(f"cifar10-resnet{depth}", "cifar-resnet", model, None, total,
                      "He et al. (2016), table 6, and the code's README: 0.27, 0.46, 0.85 M")  # fmt: skip
    model = CifarResNet(ResNetBasicblock, 32)
    save_keys("pycil-resnet32", "pycil-resnet", model, None, 464154, "He et al. (2016), table 6: 0.46 M")


if __name__ == "__main__":
    main()
