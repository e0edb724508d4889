"A sample of the sweep over model zoos; the whole is `benchmarks/zoo.py`"
import sys
from pathlib import Path
import pytest
sys.path.insert(0, str(Path(__file__).parents[1]/'benchmarks'))
import zoo

def passes(models, name):
    "Run one of a zoo's models by its name"
    make,run = next((make, run) for n,make,run in models() if n==name)
    rec = zoo.record(name, make, run)
    assert rec['result']=='passes', rec
    return rec

@pytest.mark.parametrize('name', ['BertForSequenceClassification', 'GPT2LMHeadModel', 'LlamaForCausalLM', 'MixtralForCausalLM', 'T5ForConditionalGeneration', 'ViTForImageClassification'])
def test_transformers(name):
    pytest.importorskip('transformers')
    rec = passes(zoo.language_models, f'transformers {name}')
    assert all(rec[d]['moved']>=rec[d]['layers']-1 for d in zoo.dists)

@pytest.mark.parametrize('name', ['mobilenet_v3_small', 'shufflenet_v2_x0_5', 'squeezenet1_1'])
def test_torchvision(name): passes(zoo.vision_models, f'torchvision {name}')

@pytest.mark.parametrize('name', ['mobilevit', 'resnet', 'vision_transformer'])
def test_timm(name):
    pytest.importorskip('timm')
    passes(zoo.timm_models, f'timm {name}')

def test_a_fault_is_seen():
    "A weight that nobody masks, a mask that is not enforced, a trace that is left"
    import torch
    from torch import nn
    from sparsefast.core import sparsify_model
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 4))
    sparsify_model(model, .5)
    zoo.check(model)
    model[0].weight.data[~model[0].weight_mask] = 1.
    with pytest.raises(AssertionError, match='not zero'): zoo.check(model)
    model[0].weight.data.mul_(model[0].weight_mask)
    model[1].weight_mask[:] = True
    with pytest.raises(AssertionError, match='another number'): zoo.check(model)
    assert zoo.overlooked(nn.Sequential(nn.Linear(2, 2)))==[] and zoo.others(nn.Sequential(nn.Linear(2, 2), nn.Embedding(3, 2)))==0
    part = nn.Module(); part.experts = nn.Parameter(torch.ones(2, 4, 4))
    assert zoo.others(part)==1.
