"Channels that go while a model trains: which, what is left of model and optimizer, and the budget"
import pytest, torch, torch.nn.functional as F
from hypothesis import given, strategies as st
from torch import nn
from fastai import optimizer as fo
from helpers import *
from sparsefast.layer import find_layers
from sparsefast.masks import masked_params, n_active
from sparsefast.optim import opt_params, opt_state
from sparsefast.presets import Chase, RigL
from sparsefast.ship.channels import *
from sparsefast.sparsify import sparsify_model

# ------------------------------------------------------------ `spec2.md` 6.6
SCORES = [torch.tensor(s) for s in ([.5,.1,.4,.3], [.05,.6,.2], [.02,.03,.04,.045,.8])]

@pytest.mark.parametrize('rate,gone', [(.5, [[1],[0,2],[0,1,2]]), (.4375, [[1],[0],[0,1,2]])])
def test_the_weakest_of_all_layers(rate, gone): assert weakest(SCORES, int(12-12*(1-rate)), [2, 1, 2])==gone

@given(st.lists(st.lists(st.integers(0, 5), min_size=1, max_size=7), min_size=1, max_size=4), st.integers(0, 30), st.integers(1, 3))
def test_weakest_one_by_one(scores, n, least):
    left = [dict(enumerate(s)) for s in scores]
    for _ in range(n):
        can = [(s, i, j) for i,l in enumerate(left) if len(l)>least for j,s in l.items()]
        if not can: break
        _,i,j = min(can)
        del left[i][j]
    got = weakest([torch.tensor(s).float() for s in scores], n, [least]*len(scores))
    assert got==[[j for j in range(len(s)) if j not in l] for s,l in zip(scores, left)]

# ------------------------------------------------------------ cutting
def convnet(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Conv2d(2, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 12, 3, 2, 1, bias=False), nn.BatchNorm2d(12), nn.ReLU(),
                         nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(48, 10), nn.ReLU(), nn.Linear(10, 4))

X,Y = torch.randn(16, 2, 6, 6, generator=torch.Generator().manual_seed(0)),torch.arange(16)%4

def stepped(model, opt, method, step, total=100):
    F.cross_entropy(model(X), Y).backward()
    method.step(model, opt, step, total=total)
    opt.zero_grad()

@pytest.mark.parametrize('sparse', [False, True])
def test_the_model_computes_as_without_these_channels(sparse):
    "As if the inputs that they feed had weight zero; modes, and what is not cut, stay"
    model = convnet()
    with torch.no_grad(): model[0].weight[:3].mul_(.01)
    if sparse: sparsify_model(model, .5)
    model.train(); model[4].eval()
    start = channel_counts(model, X)
    assert start=={'0': 8, '3': 12, '8': 10}
    twin = convnet()
    twin.load_state_dict({k: v for k,v in model.state_dict().items() if not k.endswith(('mask', 'sparsity'))})
    keep = {}
    for i,(a,users) in {0: (model[0], (3, 1)), 3: (model[3], (8, 4)), 8: (model[8], (10, 1))}.items(): keep[i] = a.weight.detach().double().abs().flatten(1).mean(1)
    lost = weakest(list(keep.values()), 15, [2, 3, 2])
    removed = remove_channels(model, start, .5, X)
    assert removed=={k: len(g) for k,g in zip(start, lost)} and min(removed.values())>0 and sum(removed.values())==15 and channel_counts(model, X)=={k: n-removed[k] for k,n in start.items()}
    assert model.training and not model[4].training and model[1].num_features==8-removed['0'] and model[3].in_channels==8-removed['0']
    for (user,k),g in zip(((3, 1), (8, 4), (10, 1)), lost):
        for j in g: twin[user].weight.data[:,j*k:(j+1)*k] = 0
    model.eval(); twin.eval()
    with torch.no_grad(): assert torch.allclose(model(X), twin(X), atol=1e-6)

@pytest.mark.parametrize('opt_f', [lambda ps: torch.optim.SGD(ps, lr=.05, momentum=.9), torch.optim.AdamW, lambda ps: fo.Adam(list(ps), lr=1e-3), lambda ps: fo.OptimWrapper(opt=torch.optim.Adam(list(ps), lr=1e-3))],
                         ids=['SGD', 'AdamW', 'fastai', 'OptimWrapper'])
def test_the_optimizer_goes_on(opt_f):
    "It has the new parameters, each with its part of the state, and the next steps are those of a model that never had the others"
    model = convnet()
    sparsify_model(model, .5)
    opt,method = opt_f(model.parameters()),RigL(update_every=50)
    start = channel_counts(model, X)
    for step in range(1, 4): stepped(model, opt, method, step)
    old = {n: (p.detach().clone(), {k: v.clone() for k,v in opt_state(opt, p).items() if torch.is_tensor(v)}) for n,p in model.named_parameters()}
    remove_channels(model, start, .5, X, opt=opt)
    new = dict(model.named_parameters())
    assert {id(p) for p in opt_params(opt)}=={id(p) for p in new.values()}
    for n,(w,state) in old.items():
        for k,v in state.items():
            now = opt_state(opt, new[n])[k]
            if v.shape!=w.shape: assert torch.equal(now, v); continue
            assert now.shape==new[n].shape
            pairs = dict(zip(w.flatten().tolist(), v.flatten().tolist()))                      # a weight that is not zero has its own state still
            assert all(pairs[a]==pytest.approx(b) for a,b in zip(new[n].flatten().tolist(), now.flatten().tolist()) if a)
    for step in range(4, 8):
        stepped(model, opt, method, step)
        assert all((p[~m]==0).all() for *_,p,m in masked_params(model))

def test_chase_keeps_its_budget_while_channels_go():
    "As many active weights as before, at the last update and after: in a smaller model"
    model,total = convnet(),160
    sparsify_model(model, .8)
    B,size = sum(int(m.sum()) for *_,m in masked_params(model)),sum(m.numel() for *_,m in masked_params(model))
    opt,method,start,seen = torch.optim.SGD(model.parameters(), lr=.02, momentum=.9),Chase(update_every=8),channel_counts(model, X),[]
    for step in range(1, total+1):
        stepped(model, opt, method, step, total)
        if step%8==4: remove_channels(model, start, .5*(1-(1-min(step/130, 1))**3), X, opt=opt)
        seen.append(sum(int(m.sum()) for *_,m in masked_params(model)))
        N = sum(m.numel() for *_,m in masked_params(model))
        x = method.extra_density(step, total=total)
        if method.due(step, total=total): assert abs(seen[-1]-(B+x*N))<=1
    assert seen[-1]==B and sum(channel_counts(model, X).values())==15 and N<.6*size
    assert sum(n_active(l.numel, l.target) for l in find_layers(model))==B

def test_a_dense_model_and_every_layer_retains_some():
    model = convnet()
    start = channel_counts(model, X)
    assert remove_channels(model, start, 1., X, least=.25) and channel_counts(model, X)=={'0': 2, '3': 3, '8': 2}
    assert remove_channels(model, start, 1., X, least=0.) and channel_counts(model, X)=={'0': 1, '3': 1, '8': 1}
    assert remove_channels(model, start, 1., X, least=0.)=={} and not list(masked_params(model))

@pytest.mark.parametrize('kw,match', [(dict(share=1.5), 'share must be'), (dict(share=.5, opt=fo.Lookahead(fo.Adam([nn.Parameter(torch.zeros(1))], 1e-3))), 'got Lookahead')])
def test_refused_before_anything_changes(kw, match):
    model = convnet()
    start,before = channel_counts(model, X),[p.shape for p in model.parameters()]
    with pytest.raises(ValueError, match=match): remove_channels(model, start, kw.pop('share'), X, **kw)
    assert [p.shape for p in model.parameters()]==before

def test_stored_values_are_refused_before_anything_changes():
    model = convnet()
    sparsify_model(model, .5, keep_dense=True)
    start,before = channel_counts(model, X),[p.shape for p in model.parameters()]
    with pytest.raises(ValueError, match='must not store the values of masked weights'): remove_channels(model, start, .5, X)
    assert [p.shape for p in model.parameters()]==before
