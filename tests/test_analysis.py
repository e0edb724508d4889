"The table of a sparse model: numbers by plain loops, sums, forms; and nothing is changed by looking"
import json, random
import pytest, torch
from hypothesis import given, strategies as st
from torch import nn
from fastai.torch_core import set_seed
from sparsefast.see.analysis import *
from sparsefast.see.analysis import LayerRow
from sparsefast.all import *
from sparsefast.select import is_depthwise
import sparsefast.see.recorder
from helpers import *

# ------------------------------------------------------------ live units, by feeding one unit at a time
LAYERS = dict(linear=(lambda: nn.Linear(5, 7, bias=False), (5,)), conv=(lambda: nn.Conv2d(4, 6, 3, bias=False), (4, 3, 3)), conv1d=(lambda: nn.Conv1d(4, 6, 2, bias=False), (4, 2)),
              transposed=(lambda: nn.ConvTranspose2d(4, 6, 2, bias=False), (4, 3, 3)))
@pytest.mark.parametrize('name', LAYERS)
@given(density=st.floats(0.02, 0.5), seed=st.integers(0, 99))
def test_live_units_are_those_that_carry_something(name, density, seed):
    "Through positive weights a unit that is fed comes out wherever a weight is active"
    make,shape = LAYERS[name]
    m = make()
    mask = torch.rand(m.weight.shape, generator=torch.Generator().manual_seed(seed))<density
    with torch.no_grad(): m.weight.copy_(mask.float())
    out,inp = live_units(m, mask)
    with torch.no_grad():
        one = lambda i: torch.zeros(1, *shape).index_fill_(1, torch.tensor([i]), 1.)
        reach = torch.stack([(m(one(i))!=0).flatten(2).any(2)[0] if len(shape)>1 else (m(one(i))!=0)[0] for i in range(shape[0])])
    assert torch.equal(reach.any(0), out) and torch.equal(reach.any(1), inp)

@pytest.mark.parametrize('cls', [nn.Conv2d, nn.ConvTranspose2d])
@given(density=st.floats(0.02, 0.5), groups=st.sampled_from([2, 4]), seed=st.integers(0, 99))
def test_live_units_with_groups(cls, density, groups, seed):
    m = cls(8, 12, 2, groups=groups, bias=False)
    mask = torch.rand(m.weight.shape, generator=torch.Generator().manual_seed(seed))<density
    with torch.no_grad(): m.weight.copy_(mask.float())
    out,inp = live_units(m, mask)
    with torch.no_grad(): reach = torch.stack([(m(torch.zeros(1, 8, 3, 3).index_fill_(1, torch.tensor([i]), 1.))!=0).flatten(2).any(2)[0] for i in range(8)])
    assert torch.equal(reach.any(0), out) and torch.equal(reach.any(1), inp)

def test_live_units_of_odd_layers():
    emb,mask = nn.Embedding(3, 2), torch.tensor([[1,0],[0,0],[1,0]]).bool()
    assert [u.tolist() for u in live_units(emb, mask)]==[[True, False], [True, False, True]]
    bil,mask = nn.Bilinear(2, 3, 2), torch.zeros(2, 2, 3, dtype=torch.bool)
    mask[1,0,2] = True
    assert [u.tolist() for u in live_units(bil, mask)]==[[False, True], [True, False, False, False, True]]
    assert all(torch.equal(u, mask[0,0]) for u in live_units(nn.LayerNorm(3), mask[0,0]))
    conv1d = pytest.importorskip('transformers').pytorch_utils.Conv1D(2, 3)                      # 3 inputs, 2 outputs, weight 3 x 2
    assert [len(u) for u in live_units(conv1d, torch.ones(3, 2, dtype=torch.bool))]==[2, 3]

# ------------------------------------------------------------ rows
def mixed():
    "Depthwise, excluded, frozen, tied, recurrent, attention, and an embedding"
    torch.manual_seed(0)
    m = nn.ModuleDict(dict(conv=nn.Conv2d(3, 8, 3), dw=nn.Conv2d(8, 8, 3, groups=8), emb=nn.Embedding(11, 6), rnn=nn.LSTM(6, 5), attn=nn.MultiheadAttention(6, 2), head=nn.Linear(6, 11, bias=False),
                           tied=nn.Linear(6, 11, bias=False), out=nn.Linear(6, 4), bn=nn.BatchNorm1d(4)))
    m.tied.weight = m.head.weight
    sparsify_model(m, .7, exclude='out', additional_types=[nn.Embedding])
    m.conv.weight.requires_grad_(False)
    return m

def test_rows():
    m = mixed()
    rows = {r.name: r for r in layer_rows(m)}
    assert list(rows)==['conv', 'dw', 'emb', 'rnn.weight_ih_l0', 'rnn.weight_hh_l0', 'attn.in_proj_weight', 'attn.out_proj', 'head', 'out']
    assert {n: r.note for n,r in rows.items() if r.note}==dict(conv='frozen', dw='depthwise, left dense', head='shared with tied', out='dense')
    params = dict(m.named_parameters())
    for n,r in rows.items():
        p = params.get(f'{n}.weight', params.get(n))
        mask = next((k for q,k,_ in sparse_params(m) if q is p), torch.ones_like(p).bool())
        assert r.shape==tuple(p.shape) and r.weights==p.numel() and r.active==int(mask.sum()) and r.sparsity==1-r.active/r.weights and r.masked==(n not in ('dw', 'out'))
        assert r.macs is None and r.flops is None and abs(r.target-(.7 if r.masked else 0))<1e-6

def test_totals():
    m = mixed()
    sparse,layers,whole = sparse_summary(m).totals
    rows = layer_rows(m)
    assert sparse.weights==n_params(m) and sparse.active==sum(nnz(m)) and sparse.target==pytest.approx(.7)
    assert layers.weights==sum(r.weights for r in rows) and layers.active==sum(r.active for r in rows)
    assert whole.weights==sum(p.numel() for p in m.parameters()) and whole.weights-whole.active==layers.weights-layers.active

def test_flops_are_those_of_the_flops_room():
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3, groups=8), nn.Flatten(), nn.Linear(8*16, 10))
    sparsify_model(model, .8)
    x = torch.randn(1, 3, 8, 8)
    s,count = sparse_summary(model, x), count_flops(model, x)
    assert [(r.macs, r.active_macs) for r in s.rows]==[l[:2] for l in count.layers.values()] and s.totals[-1].flops==count.flops and s.totals[-1].active_flops==count.active_flops
    assert s.totals[0].macs==count.layers['0.weight'].macs+count.layers['4.weight'].macs
    attn = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
    sparsify_model(attn, .5)
    s = sparse_summary(attn, torch.randn(1, 5, 16))
    assert s.totals[-1].macs==count_flops(attn, torch.randn(1, 5, 16)).macs>s.totals[1].macs              # products of queries and keys have no weight

def test_an_unused_layer_costs_nothing():
    model = mlp(8, 6, 4)
    model.spare = nn.Linear(3, 3)
    model.forward = lambda x: model[2](model[1](model[0](x)))
    sparsify_model(model, .5)
    assert [r.macs for r in sparse_summary(model, torch.randn(1, 8)).rows]==[48, 24, 0]

def test_dead_units_in_the_table():
    model = mlp(8, 6, 4)
    sparsify_model(model, .5)
    model[0].weight_mask[:] = True
    model[0].weight_mask[:3], model[0].weight_mask[:,:2] = False, False
    r = layer_rows(model)[0]
    assert (r.dead_out, r.outputs, r.dead_in, r.inputs)==(3, 6, 2, 8)
    assert '50.0%' in repr(sparse_summary(model)) and '25.0%' in repr(sparse_summary(model))
    model[2].weight_mask.zero_()
    assert layer_rows(model)[1].note=='empty'

def test_text():
    lines = repr(s := sparse_summary(sparse_mlp(), torch.randn(1, 8))).splitlines()
    assert lines[0].split()==['layer', 'shape', 'weights', 'active', 'sparsity', 'target', 'FLOPs', 'with', 'masks', 'dead', 'outputs', 'dead', 'inputs']
    assert len(lines)==1+3+3 and [l.split('  ')[0] for l in lines[-3:]]==['sparse layers', 'all layers', 'whole model']
    assert 'FLOPs' not in repr(sparse_summary(sparse_mlp())) and lines[1].split()[:4]==['0', '24x8', '192', str(s.rows[0].active)]

def test_html():
    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.add_module('a<b', nn.Linear(4, 4))
    sparsify_model(m := Odd(), .5)
    html = sparse_summary(m)._repr_html_()
    assert 'a&lt;b' in html and 'a<b' not in html and html.count('<tr>')==1+1+3 and html.startswith('<table')

def test_data():
    s = sparse_summary(mixed())
    d = json.loads(json.dumps(s.to_dict()))
    assert [r['name'] for r in d['totals']]==['sparse layers', 'all layers', 'whole model'] and [r['weights'] for r in d['layers']]==[r.weights for r in s.rows]
    df = s.to_df()
    assert len(df)==len(s.rows) and df.active.sum()==s.totals[1].active and df.sparsity.tolist()==[r.sparsity for r in s.rows]

@pytest.mark.parametrize('n,text', [(None, ''), (0, '0'), (86, '86'), (999, '999'), (1000, '1k'), (999_600, '1M'), (3_280_000, '3.28M'), (8.2e9, '8.2G'), (3.2e18, '3.2e+03P')])
def test_short(n, text): assert short(n)==text

def test_a_dense_model_has_a_table_and_an_empty_one_has_not():
    s = sparse_summary(mlp(4, 3, 2))
    assert s.totals[0].weights==0 and s.totals[1].sparsity==0 and [r.note for r in s.rows]==['dense', 'dense']
    with pytest.raises(ValueError, match='must have a layer.*BatchNorm1d'): sparse_summary(nn.BatchNorm1d(3))

def test_what_is_neither_a_model_nor_a_learner():
    with pytest.raises(TypeError, match='module or a Learner, got 3'): sparse_summary(3)

def test_chosen_columns():
    s = sparse_summary(sparse_mlp())
    assert s.table(['layer', 'active'])==(['layer', 'active'], [[r.name, f'{r.active:,}'] for r in s.rows+s.totals])
    with pytest.raises(ValueError, match="layer, shape.*got 'sparsit'"): s.table(['sparsit'])

@pytest.mark.parametrize('make', [lambda: nn.Linear(8, 0), lambda: nn.Linear(0, 3), lambda: nn.Conv2d(0, 4, 3), lambda: nn.ConvTranspose2d(4, 0, 3), lambda: nn.Embedding(0, 4)])
def test_a_layer_without_weights(make):
    model = make()
    out,inp = live_units(model, torch.zeros(model.weight.shape, dtype=torch.bool))
    assert {len(out), len(inp)}==set(model.weight.shape[:2]) and not out.any() and not inp.any()
    model.register_buffer('weight_mask', torch.zeros(model.weight.shape, dtype=torch.bool))
    r = sparse_summary(nn.Sequential(model)).rows[0]
    assert r.weights==r.active==0 and (r.outputs, r.inputs)==(len(out), len(inp)) and r.target==r.sparsity==0

@pytest.mark.filterwarnings('ignore')
@pytest.mark.parametrize('backend', ['eager', 'inductor'])
def test_a_compiled_model(backend):
    "Has its layers by their own names, whole or compiled in part"
    model,x = sparse_mlp(),torch.randn(1, 8)
    expected,compiled = sparse_summary(model, x).to_dict(), torch.compile(model, backend=backend)
    assert sparse_summary(compiled, x).to_dict()==expected and expected['layers'][0]['flops']==2*8*24
    assert layer_rows(compiled, count_flops(compiled, x))==sparse_summary(model, x).rows
    assert list(named_masks(compiled))==list(named_masks(model)) and list(named_masks(compiled, '2'))==['2.weight']
    model[0] = torch.compile(model[0], backend=backend)
    assert [r.flops for r in sparse_summary(model, x).rows]==[r['flops'] for r in expected['layers']]

def test_parametrized_and_lazy_layers_are_passed_over():
    model = nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(4, 4)), nn.LazyLinear(3), nn.Linear(3, 2))
    assert [r.name for r in layer_rows(model)]==['2']

def test_depthwise():
    assert is_depthwise(nn.Conv2d(4, 8, 3, groups=4)) and not is_depthwise(nn.Conv2d(4, 8, 3, groups=2)) and not is_depthwise(nn.Linear(3, 3)) and not is_depthwise(nn.Conv2d(1, 1, 3))

# ------------------------------------------------------------ a learner
def test_nothing_changes():
    "Weights, masks, random numbers, and the batches that come next"
    def run(look):
        set_seed(3)
        learn = learner(cbs=[])
        learn.dls.train.shuffle = True
        if look: learn.sparse_summary()
        batch = next(iter(learn.dls.train))[0]
        return snapshot(learn.model), batch, (torch.rand(1), random.random())
    a,b = run(False),run(True)
    assert not changed(a[0], b[0]) and torch.equal(a[1], b[1]) and a[2]==b[2]

def test_a_learner():
    learn = learner()
    s = learn.sparse_summary()
    assert s.totals[-1].macs==8*24+24*20+20*3 and s.to_dict()==sparse_summary(learn, torch.randn(1, 8)).to_dict()
    assert learn.sparse_summary(flops=False).totals[-1].macs is None and sparse_summary(learn).rows==sparse_summary(learn.model).rows

def test_a_learner_is_taken_wherever_a_model_is():
    learn,x = learner(),torch.randn(1, 8)
    count = count_flops(learn, x)
    rows = layer_rows(learn, count)
    assert count.layers==count_flops(learn.model, x).layers and rows==layer_rows(learn.model, count) and list(named_masks(learn))==list(named_masks(learn.model))
    assert total_rows(learn, rows, count)==total_rows(learn.model, rows, count)
    for f in (layer_rows, named_masks, count_flops):
        with pytest.raises(TypeError, match='module or a Learner, got 3'): f(3)
