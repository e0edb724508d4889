"Methods at initialisation: values, exact masks, and a model that is left alone"
import copy, pickle, warnings
import pytest, torch
from hypothesis import given, strategies as st
from torch import nn
from torch.nn import functional as F
from helpers import *
from sparsefast.distributions import global_sparsity, erdos_renyi_sparsity
from sparsefast.masks import masked_params, n_active, sparseable_modules
from sparsefast.saliency import *
from sparsefast.scores import random_score, weight_magnitude
from sparsefast.sparsify import sparsify_model

def batch(n=12): return batches(1, n)[0]

def mixed():
    "Convolution, batch norm, dropout, a frozen layer and tied weights"
    torch.manual_seed(0)
    tied = nn.Linear(6, 6)
    model = nn.Sequential(nn.Unflatten(1, (2,2,2)), nn.Conv2d(2, 6, 2), nn.BatchNorm2d(6), nn.ReLU(), nn.Flatten(), nn.Dropout(.5), tied, nn.ReLU(), nn.Linear(6, 6), nn.Linear(6, 3))
    model[8].weight = tied.weight
    model[9].weight.requires_grad_(False)
    return model

METHODS = dict(snip=lambda m, x, y, s=.5: snip_score(m, F.cross_entropy, x, y), grasp=lambda m, x, y, s=.5: grasp_score(m, F.cross_entropy, x, y),
               synflow=lambda m, x, y, s=.5: synflow_score(m, x, s, rounds=10))

def weights(model): return list(dict.fromkeys(m.weight for m in sparseable_modules(model)))

@pytest.mark.parametrize('name', METHODS)
def test_model_is_left_alone(name):
    model,(x,y) = mixed(),batch()
    model[1].weight.grad = torch.ones_like(model[1].weight)
    model.train(); model[5].eval()
    before,rng,modes = snapshot(model),torch.get_rng_state(),[m.training for m in model.modules()]
    score = METHODS[name](model, x, y)
    assert not changed(before, snapshot(model)) and torch.equal(rng, torch.get_rng_state()) and modes==[m.training for m in model.modules()]
    assert (model[1].weight.grad==1).all() and not model[9].weight.requires_grad and all(p.grad is None for p in model[6:].parameters())
    assert all(score(w).shape==w.shape and not score(w).requires_grad for w in weights(model)) and len(weights(model))==3

@pytest.mark.parametrize('name', METHODS)
@pytest.mark.parametrize('s', [0., .3, .5, .9])
def test_exact_masks_are_the_best_of_the_model(name, s):
    model,(x,y) = mixed(),batch()
    score = METHODS[name](model, x, y, s)
    all_scores = torch.cat([score(w).flatten() for w in weights(model)])
    n = n_active(len(all_scores), s)
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')                                                      # of layers without weights
        sparsify_model(model, s, sparse_f=global_sparsity(score), score_f=score)
    owned = {p: mask for _,_,p,mask in masked_params(model)}
    kept = torch.cat([score(w)[owned.get(w, torch.ones_like(w, dtype=torch.bool))] for w in weights(model)])
    assert len(kept)==n and torch.equal(kept.sort().values, all_scores.sort(descending=True).values[:n].sort().values)

@pytest.mark.parametrize('name', METHODS)
def test_random_masks_with_its_ratios(name):
    model,(x,y) = mixed(),batch()
    score = METHODS[name](model, x, y, .4)
    want = [round((1-s)*w.numel()) for s,w in zip(global_sparsity(score)(weights(model), .4), weights(model))]
    torch.manual_seed(5)
    sparsify_model(model, .4, sparse_f=global_sparsity(score))
    owned = {p: int(mask.sum()) for _,_,p,mask in masked_params(model)}
    assert [owned.get(w, w.numel()) for w in weights(model)]==want

@pytest.mark.parametrize('name', METHODS)
def test_a_learner_serves_as_its_model(name):
    model,(x,y) = mixed(),batch()
    rng = torch.get_rng_state()
    want = METHODS[name](model, x, y)
    torch.set_rng_state(rng)
    got = METHODS[name](learner(model), x, y)
    assert all(torch.equal(want(w), got(w)) for w in weights(model))

# ------------------------------------------------------------ values
def test_snip_values():
    torch.manual_seed(0)
    model,(x,y) = mlp(8, 5, 3, dtype=torch.float64),batches(1, dtype=torch.float64)[0]
    score = snip_score(model, F.cross_entropy, x, y)
    eps,got,want = 1e-6,[],[]
    loss = lambda: F.cross_entropy(model(x), y).item()
    with torch.no_grad():
        for w in weights(model):
            for i in range(w.numel()):
                old = w.view(-1)[i].item()
                w.view(-1)[i] = old*(1+eps); up = loss()
                w.view(-1)[i] = old*(1-eps); down = loss()
                w.view(-1)[i] = old
                want.append(abs(up-down)/(2*eps))                                            # the derivative by a gate at 1
            got += score(w).flatten().tolist()
    assert sum(got)==pytest.approx(1) and got==pytest.approx([v/sum(want) for v in want], rel=1e-4, abs=1e-9)

def test_grasp_values():
    "Against the whole Hessian; the official score -theta*(Hg), negated"
    torch.manual_seed(0)
    model,(x,y) = nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 3)).double(),(torch.randn(7, 4).double(), torch.randint(3, (7,)))
    ws,bs = weights(model),[model[0].bias.detach(), model[2].bias.detach()]
    def loss(flat):
        a,b = flat[:12].view(3,4),flat[12:].view(3,3)
        return F.cross_entropy(F.linear(F.linear(x, a, bs[0]).tanh(), b, bs[1])/200, y)
    flat = torch.cat([w.detach().flatten() for w in ws])
    H,g = torch.autograd.functional.hessian(loss, flat),torch.autograd.functional.jacobian(loss, flat)
    score = grasp_score(model, F.cross_entropy, x, y)
    torch.testing.assert_close(torch.cat([score(w).flatten() for w in ws]), -(-flat*(H@g)), rtol=1e-8, atol=1e-18)

def test_grasp_keeps_what_the_gradient_needs():
    "Removing what scores lowest raises the gradient's norm more (or lowers it less) than removing what scores highest"
    torch.manual_seed(0)
    model,(x,y) = mlp(8, 16, 3, dtype=torch.float64),batches(1, bs=60, dtype=torch.float64)[0]
    score = grasp_score(model, F.cross_entropy, x, y, temperature=1.)
    def norm_without(w, i):
        m = copy.deepcopy(model)
        m[weights(model).index(w)*2].weight.data.view(-1)[i] *= 1-1e-3
        return sum((g**2).sum() for g in torch.autograd.grad(F.cross_entropy(m(x), y), weights(m))).item()
    w = weights(model)[0]
    order = score(w).flatten().argsort()
    assert sum(norm_without(w, i) for i in order[:5])>sum(norm_without(w, i) for i in order[-5:])

def test_synflow_conserves_the_flow_of_a_network_without_biases():
    torch.manual_seed(0)
    model = mlp(8, 16, 12, 3, bias=False)
    score = synflow_score(model, batch()[0], 0., rounds=1)
    sums = [score(w).sum().item() for w in weights(model)]
    assert sums==pytest.approx([sums[0]]*3) and min(s.min() for s in map(score, weights(model)))>0

def test_synflow_rounds_by_hand():
    "Two rounds, densities 0.5 ** (1/2) and 0.5, in loops"
    torch.manual_seed(0)
    model = mlp(3, 4, 2, bias=False)
    A,B = (w.detach().double().abs() for w in weights(model))
    for k in (1, 2):
        flow_a = [[A[i,j].item()*B[:,i].sum().item() for j in range(3)] for i in range(4)]
        flow_b = [[B[o,i].item()*A[i].sum().item() for i in range(4)] for o in range(2)]
        flat = sum(flow_a, [])+sum(flow_b, [])
        keep = sorted(range(20), key=lambda i: -flat[i])[:round(20*.5**(k/2))]
        A = torch.tensor([[A[i,j].item() if 3*i+j in keep else 0. for j in range(3)] for i in range(4)], dtype=torch.float64)
        B = torch.tensor([[B[o,i].item() if 12+4*o+i in keep else 0. for i in range(4)] for o in range(2)], dtype=torch.float64)
    score = synflow_score(model, torch.randn(1, 3), .5, rounds=2)
    assert [bool(v>=0) for w in weights(model) for v in score(w).flatten()]==[i in keep for i in range(20)]

def test_synflow_avoids_layer_collapse():
    torch.manual_seed(0)
    model = mlp(20, 40, 40, 40, 3)
    score = synflow_score(model, torch.randn(1, 20), .97)
    assert all(s<1 for s in global_sparsity(score)(weights(model), .97))
    assert any(s==1 for s in global_sparsity(weight_magnitude)(weights(model), .97))            # by magnitude the largest layer loses all

# ------------------------------------------------------------ the distribution
@given(st.lists(st.lists(st.integers(0, 5), min_size=1, max_size=9), min_size=1, max_size=5), st.floats(0, 1))
def test_global_sparsity_counts(scores, s):
    params = [torch.tensor(v).float() for v in scores]
    got = global_sparsity(lambda p, **kw: p)(params, s)
    n,N = [round((1-g)*len(v)) for g,v in zip(got, scores)],sum(map(len, scores))
    order = sorted(((-v,i,j) for i,vs in enumerate(scores) for j,v in enumerate(vs)))[:round((1-s)*N)]
    assert sum(n)==round((1-s)*N) and n==[sum(i==l for _,i,_ in order) for l in range(len(scores))]

def test_distribution_can_be_pickled(): assert pickle.loads(pickle.dumps(global_sparsity(weight_magnitude)))([torch.ones(4)], .5)==[.5]

# ------------------------------------------------------------ bad input
def test_refusals():
    model,(x,y) = mixed(),batch()
    score = snip_score(model, F.cross_entropy, x, y)
    with pytest.raises(ValueError, match='no score for a parameter of shape'): score(copy.deepcopy(model)[1].weight)
    with pytest.raises(ValueError, match='additional_types'): snip_score(nn.ReLU(), F.cross_entropy, x, y)
    with pytest.raises(ValueError, match='the loss of the batch is nan'): snip_score(model, F.cross_entropy, x*float('nan'), y)
    with pytest.raises(ValueError, match='all weights have score 0'): snip_score(mlp(8, 3), lambda o, y: (o*0).sum(), x, y)
    with pytest.raises(TypeError, match='model must be a module or a Learner'): snip_score('resnet', F.cross_entropy, x, y)
    with pytest.raises(ValueError, match='from 0 to 1'): synflow_score(model, x, 95)
    with pytest.raises(ValueError, match='scores of layer 0 must be numbers, got NaN'): global_sparsity(lambda p, **kw: p*float('nan'))([torch.ones(3)], .5)

@pytest.mark.parametrize('s', [0., .999])
@pytest.mark.parametrize('name', METHODS)
def test_extreme(name, s):
    model,(x,y) = nn.Sequential(nn.Linear(8, 1), nn.Linear(1, 3)),batch()
    score = METHODS[name](model, x, y, s)
    assert sum(round((1-v)*w.numel()) for v,w in zip(global_sparsity(score)(weights(model), s), weights(model)))==n_active(11, s)
