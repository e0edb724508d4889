"Growth from the mask alone, and growth in a subset: brute force over paths, the vectors of the papers' rules, exact budgets"
import copy, math, pickle, random, warnings
from functools import partial
import pytest, torch
from hypothesis import given, strategies as st
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from helpers import *
from sparsefast import presets
from sparsefast.masks import n_active, sparse_mask
from sparsefast.methods import DSTMethod
from sparsefast.patterns import drop_grow, fan_in_pattern
from sparsefast.presets import CHTs, CHTss, GSE, SEFT
from sparsefast.rewire import sparse_layers
from sparsefast.schedules import sigmoid_anneal
from sparsefast.scores import *
from sparsefast.sparsify import sparsify_model
from sparsefast.storage import to_sparse_layers
from sparsefast.draws import *
from sparsefast.draws import _pairs
from sparsefast.serialize import load_method, save_method
from sparsefast.tokens import *
from sparsefast.topology import *

def gen(seed=0): return torch.Generator().manual_seed(seed)
def quiet(f, **kwargs):
    with warnings.catch_warnings():
        warnings.simplefilter('ignore', UserWarning)                                        # of intervals this short
        return f(**kwargs)

# ------------------------------------------------------------ paths of three links
def ch2_by_paths(M):
    "A sum over the nodes of all paths a-j-z-b and b-u-y-a, by sets; lists of lists, 0 at links"
    o,i = len(M), len(M[0])
    ins  = [{j for j in range(i) if M[a][j]} for a in range(o)]
    outs = [{a for a in range(o) if M[a][j]} for j in range(i)]
    def nodes(a, b, mine, other):
        "`mine[a]` are neighbours of a on the other side; `other[b]` are neighbours of b on a's side"
        total = 0.
        for z in other[b]:
            inner = len(mine[z]&mine[a])
            if z==a or not inner: continue
            total += (1+inner)/(1+len(mine[z])-inner-1)
        return total
    return [[0. if M[a][b] else nodes(a, b, ins, outs)+nodes(b, a, outs, ins) for b in range(i)] for a in range(o)]

M1 = [[1,1,0,0,1], [1,0,1,0,0], [0,1,1,1,0], [0,0,0,1,0]]
S1 = [[0,0,7,3,0], [0,6,0,3,3], [7,0,0,0,3], [0,3,3,0,0]]
W2 = [[.9,-.2,0,0,.5], [.4,0,-.7,0,0], [0,.1,.6,-.3,0], [0,0,0,.8,0]]

def at_zeros(mask, **kwargs): return ch2_l3n(torch.zeros(mask.shape), mask, generator=gen(), **kwargs).masked_fill(mask, 0).double()

def test_ch2_vector():
    mask = torch.tensor(M1).bool()
    assert ch2_by_paths(M1)==S1
    torch.testing.assert_close(at_zeros(mask), torch.tensor(S1).double(), rtol=0, atol=1e-20)

@given(st.integers(1, 7), st.integers(1, 7), st.floats(0, 1), st.integers(0, 999))
def test_ch2_is_the_sum_over_paths(o, i, density, seed):
    mask = torch.rand(o, i, generator=gen(seed))<density
    torch.testing.assert_close(at_zeros(mask), torch.tensor(ch2_by_paths(mask.int().tolist())).double(), rtol=1e-6, atol=1e-20)
    torch.testing.assert_close(at_zeros(mask.t()).t(), at_zeros(mask), rtol=1e-6, atol=1e-20)       # of a transposed weight

def test_growth_looks_at_what_survived():
    "An update without sampling, by the vector; the mask before the drop would grow others"
    w = torch.tensor(W2)
    mask = w!=0
    new = drop_grow(mask, w.abs(), lambda kept: ch2_l3n(w, mask=mask, kept=kept, generator=gen()), 2)
    assert new.int().tolist()==[[1,0,1,0,1], [1,0,1,1,0], [0,0,1,1,0], [0,0,0,1,0]]
    assert not new.equal(drop_grow(mask, w.abs(), lambda kept: ch2_l3n(w, mask=mask, generator=gen()), 2))

def test_the_engine_hands_over_what_survived():
    layer = nn.Linear(5, 4, bias=False)
    layer.weight.data.copy_(torch.tensor(W2))
    sparsify_model(layer, .55, masks={layer: layer.weight!=0})
    layer.weight.grad = torch.zeros(4, 5)
    m = DSTMethod(grow_score_f=ch2_l3n, initial_drop_grow_pct=.3, batches_per_update=50)
    m.update(layer, torch.optim.SGD(layer.parameters(), lr=.1), 50, 0.)
    assert layer.weight_mask.int().tolist()==[[1,0,1,0,1], [1,0,1,1,0], [0,0,1,1,0], [0,0,0,1,0]]

@pytest.mark.parametrize('wrap', [lambda f: f, sampled])
def test_without_paths_chance_decides(wrap):
    "Links with a path come first, and the others all equally often"
    mask = torch.tensor([[1,1,0,0], [1,0,0,0]]).bool()                                     # only (1, 1) has a path
    counts = torch.zeros(2, 4)
    for s in range(3000):
        new = drop_grow(mask, mask.float(), wrap(ch2_l3n)(torch.zeros(2, 4), mask=mask, generator=gen(s)), 0, 3)
        assert new[1,1] and int(new.sum())==6
        counts += new & ~mask
    others = counts[:,2:]/3000
    assert (others-.5).abs().max()<.05

@pytest.mark.parametrize('kernel', [(1,1), (3,), (3,2)])
def test_kernels_are_links(kernel):
    "A kernel counts as a link if any of its weights is active, and its score is shared out among the inactive ones"
    torch.manual_seed(1)
    pairs = torch.rand(5, 6)<.4
    mask = pairs.view(5, 6, *[1]*len(kernel)) & (torch.rand(5, 6, *kernel)<.7)
    links = mask.flatten(2).any(2)
    got = ch2_l3n(torch.zeros(mask.shape), mask, generator=gen())
    sums = torch.where(mask, 0, got).flatten(2).sum(2)
    torch.testing.assert_close(sums.double()[~links], torch.tensor(ch2_by_paths(links.int().tolist())).double()[~links], rtol=1e-5, atol=1e-20)
    spread = got.flatten(2)
    assert all(spread[a,b].unique().numel()==1 for a,b in (spread.amin(2)>1e-20).nonzero().tolist())

def test_a_link_is_no_path_to_itself():
    "A kernel that is linked and not full is scored over other nodes than its own ends"
    torch.manual_seed(2)
    links = torch.rand(5, 6)<.5
    mask = torch.stack([links, torch.zeros_like(links)], 2)
    M,(o,i) = links.int().tolist(),links.shape
    def over(M, a, b):
        shared = [sum(x*y for x,y in zip(M[a], row)) for row in M]
        return sum((1+shared[z])/max(sum(M[z])-shared[z], 1) for z in range(len(M)) if z!=a and M[z][b] and shared[z])
    turned = links.t().int().tolist()
    want = torch.tensor([[over(M, a, b)+over(turned, b, a) for b in range(i)] for a in range(o)])
    got = ch2_l3n(torch.zeros(mask.shape), mask, generator=gen())
    assert (want[links]>0).sum()>5
    torch.testing.assert_close(got[...,1][links], want[links], rtol=1e-5, atol=1e-20)

# ------------------------------------------------------------ first masks
def test_brf_weights():
    "The first draw of an output at place 2 of 6"
    want = torch.tensor([.027646, .093305, .746436, .093305, .027646, .011663]).double()
    p,counts,n = torch.zeros(3, 6),torch.zeros(6),20_000
    g = gen()
    for _ in range(n//100):
        rows = torch.stack([brf_score(p, g)[1] for _ in range(100)])
        counts += rows.argmax(1).bincount(minlength=6)
    chi2 = ((counts-n*want)**2/(n*want)).sum().item()
    assert chi2<20.5                                                                        # of five degrees of freedom: one in a thousand
    assert float(-3*torch.tensor(2.).log())==pytest.approx(math.log(.093305/.746436), abs=1e-4)

def test_brf_extremes():
    nearest = [drop_grow(torch.zeros(4, 8).bool(), torch.zeros(4, 8), brf_score(torch.zeros(4, 8), gen(), r=0.), 0, 12) for _ in range(2)]
    assert nearest[0].equal(nearest[1]) and nearest[0].int().tolist()==[[1,1,0,0,0,0,0,1], [0,1,1,1,0,0,0,0], [0,0,0,1,1,1,0,0], [0,0,0,0,0,1,1,1]]
    wide = torch.stack([brf_score(torch.zeros(1, 10), gen(s), r=1.)[0] for s in range(4000)]).argmax(1).bincount(minlength=10)
    assert (wide/4000-.1).abs().max()<.02
    for r in (-.1, 1.1):
        with pytest.raises(ValueError, match='r must be'): brf_score(torch.zeros(2, 2), r=r)

@pytest.mark.parametrize('layer', [nn.Linear(20, 8), nn.Linear(6, 15), nn.Conv2d(12, 6, 3)], ids=['wide', 'high', 'conv'])
def test_brf_masks_of_a_model(layer):
    "Equal rows by the pattern; links lie near their place"
    sparsify_model(layer, .75, score_f=brf_score, pattern_f=partial(fan_in_pattern, ablate=0))
    mask = layer.weight_mask.flatten(1)
    assert len(set(mask.sum(1).tolist()))==1
    n,m = layer.weight.shape[:2]
    place = (torch.arange(n)*max(1, m//n)%m)[:,None]
    far = (torch.arange(m)-place).abs()
    far = torch.minimum(far, m-far).view(n, m, *[1]*(layer.weight.dim()-2)).expand(layer.weight.shape)
    assert far[layer.weight_mask].float().mean()<.8*far.float().mean()

# ------------------------------------------------------------ a subset of the gradient
def test_uniform_subset():
    "As many draws with replacement as there are active weights, anywhere; everything at half density"
    mask = sparse_mask((200, 300), .9)
    hit = uniform_subset(mask, gen())
    assert abs(int((hit&~mask).sum())/60_000-.9*(1-math.exp(-.1)))<.003 and abs(hit.float().mean()-(1-math.exp(-.1)))<.003
    assert uniform_subset(mask, gen()).equal(hit) and not uniform_subset(mask, gen(1)).equal(hit)
    assert uniform_subset(mask, gen(), factor=2.).sum()>1.8*hit.sum()
    assert uniform_subset(sparse_mask((20, 30), .5), gen()).all() and not uniform_subset(torch.zeros(3, 4).bool(), gen()).any()

def grown_by_gse(p, mask, n, seed):
    "Plain loops: the best |g| of the subset that was not active, then chance; what was active last of all"
    g = gen(seed)
    subset = uniform_subset(mask, g).flatten().tolist()
    luck = torch.rand(mask.shape, generator=g).flatten().tolist()
    old,grad = mask.flatten().tolist(),p.grad.flatten().tolist()
    order = sorted((k for k in range(len(old)) if not old[k]), key=lambda k: (-abs(grad[k]), 0, k) if subset[k] else (1, luck[k], k))
    return set(order[:n])

@given(st.integers(2, 9), st.integers(2, 9), st.floats(0, .49), st.integers(0, 99))
def test_growth_in_a_subset(o, i, density, seed):
    torch.manual_seed(seed)
    p,mask = nn.Parameter(torch.randn(o, i)),torch.rand(o, i)<density
    p.grad = torch.randn(o, i)
    n = int((~mask).sum())//2
    kept = mask & (torch.rand(o, i)<.7)
    new = drop_grow(kept, p.abs().detach(), in_subset()(p, mask=mask, kept=kept, generator=gen(seed)), 0, n)
    got = set((new & ~kept).flatten().nonzero().flatten().tolist())
    assert got==grown_by_gse(p, mask, n, seed)

def test_what_was_active_comes_back_last():
    p,mask = nn.Parameter(torch.zeros(4, 5)),torch.zeros(4, 5).bool()
    p.grad = torch.ones(4, 5)
    mask[0] = True
    score = in_subset()(p, mask=mask, generator=gen())
    assert (score[0]==-torch.inf).all() and score[1:].isfinite().all() and ((score[1:]==1)|((score[1:]<=-1)&(score[1:]>=-2))).all()

# ------------------------------------------------------------ the methods
def wide(sizes=(12,60,40,3), dtype=torch.float64, seed=0):
    torch.manual_seed(seed)
    return mlp(*sizes, dtype=dtype)

GSE_local = partial(GSE, drop_share_f=None, grow_share_f=None)
def GSE_guided(draw, **kwargs): return GSE(**{'grow_score_f': in_subset(subset_f=draw), **kwargs})
GraBo,GraEst = partial(GSE_guided, grabo_subset),partial(GSE_guided, graest_subset)

@pytest.mark.parametrize('compressed', [False, True])
@pytest.mark.parametrize('make', [CHTs, CHTss, GSE, GSE_local, GraBo, GraEst, SEFT], ids=['CHTs', 'CHTss', 'GSE', 'GSE_local', 'GraBo', 'GraEst', 'SEFT'])
def test_budget_at_every_update(make, compressed):
    "Each layer has exactly the weights of its schedule after every update, masked and compressed; with a ranking of all layers the model has"
    m,total,moved = quiet(make, update_every=5, **(dict(grad_steps=2) if make is SEFT else {})),60,0
    model = wide()
    sparsify_model(model, .9, **m.sparsify_kwargs(.9))
    if compressed: to_sparse_layers(model, least=0.)
    opt = torch.optim.AdamW(model.parameters(), lr=1e-2)
    m.enforce(model, opt)
    for step,(x,y) in enumerate(batches(total, n_in=12, dtype=torch.float64), 1):
        before = [l.mask.clone() for l in sparse_layers(model)]
        backward(model, x, y)
        m.step(model, opt, step, total=total)
        layers = sparse_layers(model)
        changed_now = any(not l.mask.equal(b) for l,b in zip(layers, before))
        assert not changed_now or m.due(step, total=total)
        moved += changed_now
        if m.due(step, total=total):
            pos = m.sparsity_pos(step, total=total)
            has,want = [int(l.nnz) for l in layers],[n_active(l.numel, m.sparsity_at(l.target, pos)) for l in layers]
            assert (sum(has)==sum(want) and all(has)) if make in (GSE, GraBo, GraEst) else has==want, step
    has,want = [int(l.nnz) for l in sparse_layers(model)],[n_active(l.numel, .9) for l in sparse_layers(model)]
    assert moved>=5 and sum(has)==sum(want) and (has==want)==(make not in (GSE, GraBo, GraEst))

def plain_gse(weights, masks, grads, share, seed, step):
    "Plain loops: the smallest |w| of all layers go; the best |g| in the subsets come, then chance; what was active before does not return"
    order = sorted((abs(w), i, k) for i,(ws,ms) in enumerate(zip(weights, masks)) for k,(w,m) in enumerate(zip(ws, ms)) if m)
    n = sum(int(share*sum(ms)) for ms in masks)
    gone,cands = {(i, k) for _,i,k in order[:n]},[]
    for i,(gs,ms) in enumerate(zip(grads, masks)):
        g = torch.Generator().manual_seed(random.Random(repr((seed, step, i))).getrandbits(32))
        subset = uniform_subset(torch.tensor(ms), g).tolist()
        luck = torch.rand(len(ms), generator=g).tolist()
        cands += [(-abs(gs[k]) if subset[k] else 1+luck[k], i, k) for k in range(len(ms)) if not ms[k]]
    born = {(i, k) for _,i,k in sorted(cands)[:n]}
    return [[(m and (i, k) not in gone) or (i, k) in born for k,m in enumerate(ms)] for i,ms in enumerate(masks)]

@pytest.mark.parametrize('compressed', [False, True])
def test_gse_ranks_the_whole_model(compressed):
    "One update against plain loops in float64"
    m,model = quiet(GSE, update_every=5, seed=4),wide()
    sparsify_model(model, .8)
    dense = copy.deepcopy(model)
    if compressed: to_sparse_layers(model, least=0.)
    opt = torch.optim.SGD(model.parameters(), lr=0.)
    m.enforce(model, opt)
    x,y = batches(1, n_in=12, dtype=torch.float64)[0]
    for net in (dense, model): backward(net, x, y)
    flat = lambda f: [f(l).flatten().tolist() for l in sparse_layers(dense)]
    want = plain_gse(flat(lambda l: l.p), flat(lambda l: l.mask), flat(lambda l: l.p.grad), m.drop_pct(.1), 4, 10)
    m.update(model, opt, 10, .1)
    assert [l.mask.flatten().tolist() for l in sparse_layers(model)]==want
    assert [sum(k) for k in want]!=[int(l.nnz) for l in sparse_layers(dense)]

def test_chtss_follows_its_curve():
    m = quiet(CHTss, update_every=1)
    for p,s in zip((0, .1, .25, .5, .75, .9, 1), (.5, .5025732, .5203295, .725, .9296705, .9474268, .95)):
        assert sigmoid_anneal(.5, .95, p)==pytest.approx(s, abs=1e-7) and m.sparsity_at(.95, p)==pytest.approx(s, abs=1e-7)
    assert sigmoid_anneal(.95, .5, .25)==pytest.approx(.95+.5-.5203295, abs=1e-7)
    gamma = CHTs().keep_score_f.keywords['gamma']
    assert gamma(0.)==1 and gamma(.75)==pytest.approx(3) and CHTs().stop_pct==.75
    assert m.sparsity_pos(500, pct=.375)==pytest.approx(.5) and m.sparsity_pos(500, pct=.75)==1.

@pytest.mark.parametrize('make', [CHTs, CHTss])
def test_no_gradient_is_read(make):
    "Masks are the same whatever the gradients of weights that are not active"
    runs = []
    for noise in (0., 100.):
        m,model = quiet(make, update_every=4),wide()
        torch.manual_seed(3)
        sparsify_model(model, .8, **m.sparsify_kwargs(.8))
        opt = torch.optim.SGD(model.parameters(), lr=.1, momentum=.9)
        for step,(x,y) in enumerate(batches(40, n_in=12, dtype=torch.float64), 1):
            backward(model, x, y)
            for l in sparse_layers(model): l.p.grad[~l.mask] += noise
            m.step(model, opt, step, total=40)
            assert not m.needs_dense_grad(step, total=40)
        runs.append(masks(model))
    assert same_masks(*runs)

def test_chtss_prunes_by_relative_importance():
    m,model = quiet(CHTss, update_every=5, initial_drop_grow_pct=0.),wide()
    sparsify_model(model, .9, **m.sparsify_kwargs(.9))
    l = sparse_layers(model)[0]
    backward(model, *batches(1, n_in=12, dtype=torch.float64)[0])
    w,old = l.p.detach().clone(),l.mask.clone()
    m.update(model, torch.optim.SGD(model.parameters(), lr=.1), 50, .375)
    ri = relative_importance(w)
    assert int(l.nnz)==n_active(l.numel, .7) and (old & ~l.mask).any() and ri[l.mask].min()>=ri[old & ~l.mask].max()

def test_new_weights_of_seft_wait_for_the_next_update():
    "They are at zero, where sensitivity is zero: the update that grows them does not drop them"
    m,model = quiet(SEFT, update_every=3, grad_steps=1),wide()
    sparsify_model(model, .8)
    opt = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for step,(x,y) in enumerate(batches(3, n_in=12, dtype=torch.float64), 1):
        backward(model, x, y)
        if step==3: before = [(l.p.grad.clone(), l.mask.clone()) for l in sparse_layers(model)]
        m.step(model, opt, step, total=100)
    for l,(g,old) in zip(sparse_layers(model), before):
        born = l.mask & ~old
        assert (l.p[born]==0).all() and int(born.sum()) and g[born].abs().min()>=g[~old & ~l.mask].abs().max()

@pytest.mark.parametrize('name', ['CHTs', 'CHTss', 'GSE', 'SEFT'])
def test_methods_can_be_pickled(name):
    m = getattr(presets, name)()
    again = pickle.loads(pickle.dumps(m))
    assert repr(again.keep_score_f).split(' at ')[0]==repr(m.keep_score_f).split(' at ')[0] and again.reads==m.reads and again.batches_per_update==m.batches_per_update

# ------------------------------------------------------------ the gradient in compressed layers
def compressed(layer, sparsity=.9):
    sparsify_model(layer, sparsity)
    model = nn.Sequential(layer)
    twin = copy.deepcopy(model)
    to_sparse_layers(twin, least=0.)
    return model,twin

LAYERS = dict(linear=(lambda: nn.Linear(40, 60), (8,40)), tokens=(lambda: nn.Linear(40, 60), (3,5,40)), conv=(lambda: nn.Conv2d(6, 16, 3, padding=1), (2,6,7,7)),
              groups=(lambda: nn.Conv2d(6, 16, 3, stride=2, groups=2), (2,6,7,7)), conv1d=(lambda: nn.Conv1d(6, 16, 3), (2,6,9)))

@pytest.mark.parametrize('case', LAYERS)
@pytest.mark.parametrize('passes', [1, 2])
def test_gradient_at_positions_is_the_dense_one(case, passes):
    make,size = LAYERS[case]
    model,twin = compressed(make().double())
    twin[0].keep_gradient()
    for m in (model, twin):
        torch.manual_seed(5)
        for _ in range(passes): m(torch.randn(size).double()).square().sum().backward()
    where = torch.rand(model[0].weight.shape)<.2
    for n in (1, 3, 100):
        pieces = list(twin[0].gradients_at(where, n))
        assert torch.allclose(torch.cat([g for _,g in pieces]), model[0].weight.grad*where, rtol=1e-9) and pieces[-1][0].stop==len(where)

@pytest.mark.parametrize('case', LAYERS)
def test_subset_scores_are_those_of_the_masked_layer(case):
    "Bit for bit where nothing is read but chance, and to rounding where gradients are"
    make,size = LAYERS[case]
    model,twin = compressed(make().double())
    twin[0].keep_gradient()
    for m in (model, twin):
        torch.manual_seed(5)
        m(torch.randn(size).double()).square().sum().backward()
    (a,),(b,) = sparse_layers(model),sparse_layers(twin)
    f = in_subset()
    whole = a.scores(f, None, mask=a.mask, generator=gen())
    assert (whole>=0).sum()>5 and torch.allclose(whole, b.scores(f, None, mask=b.mask, generator=gen()), rtol=1e-9)
    pieces = b.score_pieces(f, None, mask=b.mask, generator=gen())
    assert torch.allclose(whole.flatten(), pieces.flatten() if torch.is_tensor(pieces) else torch.cat(list(pieces)), rtol=1e-9)

def largest(f):
    "The sizes of new tensors of more than a byte a number that `f` makes"
    seen = []
    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, op, types, args=(), kw=None):
            out = op(*args, **(kw or {}))
            seen.extend(t.numel() for t in (out if isinstance(out, (tuple, list)) else [out]) if torch.is_tensor(t) and t.element_size()>1
                        and t.layout==torch.strided and t.untyped_storage().nbytes()>=t.numel()*t.element_size())
            return out
    with Watch(): f()
    return max(seen)

@pytest.mark.skipif('config.getoption("--device")', reason='what only a processor does')
@pytest.mark.parametrize('case', ['linear', 'conv'])
def test_an_update_of_gse_makes_no_dense_gradient(case, monkeypatch):
    "Nothing of the weight's size but masks, which take a byte a weight; RigL in a convolution does make one"
    from sparsefast.storage import update
    monkeypatch.setattr(update, '_at_once', 16)
    make,size = dict(linear=(lambda: nn.Linear(100, 120), (4,100)), conv=(lambda: nn.Conv2d(40, 60, 3), (1,40,3,3)))[case]
    sizes = {}
    for name,method in dict(GSE=quiet(GSE, update_every=2), GSE_local=quiet(GSE_local, update_every=2), GraBo=quiet(GraBo, update_every=2), GraEst=quiet(GraEst, update_every=2), RigL=quiet(presets.RigL, update_every=2)).items():
        torch.manual_seed(0)
        _,model = compressed(make(), .95)
        opt = torch.optim.Adam(model.parameters())
        method.enforce(model, opt)
        for step in (1, 2):
            opt.zero_grad()
            model(torch.randn(size)).square().sum().backward()
            before = model[0].weight_mask
            act = partial(method.step, model, opt, step, 0.)
            if step==2: sizes[name] = largest(act)
            else: act()
        assert not before.equal(model[0].weight_mask)
    numel = model[0].shape.numel()
    assert max(sizes[n] for n in ('GSE', 'GSE_local', 'GraBo', 'GraEst'))<numel/4 and (case=='linear' or sizes['RigL']>=numel), (sizes, numel)

# ------------------------------------------------------------ draws guided by what goes in and comes back
X = torch.tensor([[1,0,2,-1,.5], [0,3,-2,1,.5], [2,0,1,1,0]])
G = torch.tensor([[.2,-.1,0,.3], [-.4,.1,.2,0], [.1,0,-.3,.2]])

def test_vectors_of_guided_draws():
    rows,columns = token_sums([(G, X)], linear_sums, False)
    assert rows.allclose(torch.tensor([.7,.2,.5,.5])) and columns.allclose(torch.tensor([[3.,3,5,3,1]]))
    rows,columns = (t.abs() for t in linear_sums(G, X, torch.tensor([1.,-1,1])))
    assert rows.allclose(torch.tensor([.7,.2,.5,.5])) and columns.allclose(torch.tensor([[3.,3,5,1,0]]))
    signs = [s for s in range(400) if (2*torch.randint(2, (3,), generator=gen(s))-1).tolist()==[1,-1,1]][0]
    assert token_sums([(G, X)], linear_sums, False, gen(signs))[1].allclose(columns)
    twice = token_sums([(G, X), (G, X)], linear_sums, False)
    assert twice[0].allclose(torch.tensor([1.4,.4,1.,1.])) and twice[1].allclose(torch.tensor([[6.,6,10,6,2]]))

def slow_sums(layer, g, x, s):
    "One token at a time, in float64: each output, and each input that a place of the kernel reads, by group"
    if isinstance(layer, nn.Linear):
        g,x = g.reshape(-1, g.shape[-1]).tolist(),x.reshape(-1, x.shape[-1]).tolist()
        return [sum(s[t]*row[i] for t,row in enumerate(g)) for i in range(len(g[0]))],[[sum(s[t]*row[j] for t,row in enumerate(x)) for j in range(len(x[0]))]]
    two = lambda v: v if layer.weight.dim()==4 else (1, *v)
    (kh,kw),(sh,sw),(ph,pw),(dh,dw) = two(layer.kernel_size),two(layer.stride),(layer.padding if layer.weight.dim()==4 else (0, *layer.padding)),two(layer.dilation)
    if layer.weight.dim()==3: g,x = g.unsqueeze(2),x.unsqueeze(2)
    n,c,h,w = x.shape
    per = c//layer.groups
    tokens = [(b, i, j) for b in range(n) for i in range(g.shape[2]) for j in range(g.shape[3])]
    def read(b, k, y, z): return x[b,k,y,z].item() if 0<=y<h and 0<=z<w else 0.
    rows = [sum(s[t]*g[b,o,i,j].item() for t,(b,i,j) in enumerate(tokens)) for o in range(g.shape[1])]
    columns = [[sum(s[t]*read(b, q*per+k, i*sh-ph+u*dh, j*sw-pw+v*dw) for t,(b,i,j) in enumerate(tokens)) for k in range(per) for u in range(kh) for v in range(kw)]
               for q in range(layer.groups)]
    return rows,columns

TOKENS = dict(linear=(lambda: nn.Linear(4, 6), (3,4)), tokens=(lambda: nn.Linear(4, 6), (2,3,4)), conv=(lambda: nn.Conv2d(2, 4, 3, padding=1), (2,2,4,5)),
              groups=(lambda: nn.Conv2d(4, 6, 3, stride=2, groups=2, dilation=2, padding=2), (2,4,6,5)), conv1d=(lambda: nn.Conv1d(2, 4, 3, padding=1), (2,2,6)))

@pytest.mark.parametrize('case', TOKENS)
@pytest.mark.parametrize('signed', [False, True])
def test_token_sums_are_those_of_plain_loops(case, signed):
    "Masked and compressed, over two backward passes"
    make,size = TOKENS[case]
    torch.manual_seed(0)
    model,twin = compressed(make().double(), .8)
    layer,rows,columns = model[0],0,0
    hook = TokenHook.of(layer, make=True)
    twin[0].keep_gradient()
    g = gen(7)
    for k in range(2):
        x = torch.randn(size, generator=gen(k)).double()
        y = model(x)
        back = torch.randn(y.shape, generator=gen(9+k)).double()
        y.backward(back)
        twin(x).backward(back)
        n = back[...,0].numel() if isinstance(layer, nn.Linear) else back[:,:1].numel()
        s = (2*torch.randint(2, (n,) if isinstance(layer, nn.Linear) else back[:,:1].shape, generator=g)-1).flatten().tolist() if signed else [1]*n
        r,c = slow_sums(layer, *((back, x) if signed else (back.abs(), x.abs())), s)
        rows,columns = rows+torch.tensor(r, dtype=torch.float64),columns+torch.tensor(c, dtype=torch.float64)
    want = rows.abs(),columns.abs()
    for l in (sparse_layers(model)[0], sparse_layers(twin)[0]):
        got = l.token_sums(gen(7) if signed else None)
        assert all(torch.allclose(a, b, rtol=1e-9) for a,b in zip(got, want))
    assert hook.held

def test_draws_follow_both_sums():
    "Chi-square of 40,000 draws of a convolution with two groups, whose columns differ"
    rows,columns = torch.tensor([1.,2,0,5]),torch.tensor([[1.,0,3], [0,2,2]])
    at = _pairs(rows, columns, 40_000, gen())
    want = (rows[:,None]/8*(columns/4).repeat_interleave(2, 0)).flatten().double()
    counts = at.bincount(minlength=12).double()
    assert not counts[want==0].any() and ((counts-40_000*want)**2/(40_000*want))[want>0].sum()<20.5
    dead = _pairs(torch.zeros(3), torch.zeros(1, 4), 6000, gen()).bincount(minlength=12)
    assert (dead/6000-1/12).abs().max()<.02

@pytest.mark.parametrize('make', [GraBo, GraEst], ids=['GraBo', 'GraEst'])
@pytest.mark.parametrize('kind', ['linear', 'conv'])
def test_guided_training_is_the_same_masked_and_compressed(make, kind):
    def net():
        torch.manual_seed(0)
        if kind=='linear': return wide()
        return nn.Sequential(nn.Unflatten(1, (4,3,1)), nn.Conv2d(4, 12, (2,1), groups=2), nn.ReLU(), nn.Conv2d(12, 10, 1), nn.ReLU(), nn.Flatten(), nn.Linear(20, 3)).double()
    m,models = quiet(make, update_every=4),[net(), net()]
    for model in models:
        torch.manual_seed(1)
        sparsify_model(model, .8)
    to_sparse_layers(models[1], least=0.)
    opts = [torch.optim.SGD(model.parameters(), lr=.05, momentum=.9) for model in models]
    for model,opt in zip(models, opts): m.enforce(model, opt)
    first = masks(models[0])
    for step,(x,y) in enumerate(batches(40, n_in=12, dtype=torch.float64), 1):
        for model,opt in zip(models, opts):
            backward(model, x, y)
            m.step(model, opt, step, total=40)
        assert all(a.mask.equal(b.mask) for a,b in zip(*map(sparse_layers, models))), step
    assert not same_masks(first, masks(models[0]))
    assert not any(isinstance(h, TokenHook) for mod in models[0].modules() for h in mod._forward_hooks.values())       # none is left

def test_a_hook_holds_one_step():
    layer,hook = nn.Linear(5, 4),None
    hook = TokenHook.of(layer, make=True)
    assert TokenHook.of(layer, make=True) is hook
    for _ in range(3):
        layer.zero_grad()
        for _ in range(2): layer(X).backward(G)
        assert len(hook.held)==2
    with torch.no_grad(): layer(X)
    assert len(hook.held)==2
    twin = copy.deepcopy(layer)
    assert TokenHook.of(twin) is not hook and TokenHook.of(twin).held==[]
    for l in (layer, twin):
        TokenHook.of(l).wanted = False
        l.zero_grad(), l(X)
        assert TokenHook.of(l) is None
    assert hook.held==[]

def test_a_compressed_layer_takes_no_hook_along():
    m,model = quiet(GraEst, update_every=5),wide()
    sparsify_model(model, .8)
    opt = torch.optim.SGD(model.parameters(), lr=.1)
    m.enforce(model, opt)
    assert TokenHook.of(model[0]) is not None
    to_sparse_layers(model, opt, least=0.)
    assert TokenHook.of(model[0]) is None and model[0].weight_mask.any()

def test_a_layer_called_by_keyword_shows_its_inputs():
    class Named(nn.Module):
        def __init__(self): super().__init__(); self.a,self.b = wide()[0],wide()[2:]
        def forward(self, x): return self.b(self.a(input=x).relu())
    def run(model):
        torch.manual_seed(0)
        sparsify_model(model, .8)
        opt,m = torch.optim.SGD(model.parameters(), lr=.1),quiet(GraEst, update_every=2)
        for step,(x,y) in enumerate(batches(6, n_in=12, dtype=torch.float64), 1):
            backward(model, x, y)
            m.step(model, opt, step, total=12)
        return masks(model)
    assert same_masks(run(Named()), run(wide()))

def test_what_guided_draws_cannot_serve():
    attention = nn.MultiheadAttention(8, 2)
    sparsify_model(attention, .8)
    with pytest.raises(ValueError, match='draws by inputs and output gradients, which only linear layers and convolutions show: use another method'):
        quiet(GraBo, update_every=5).check(attention, torch.optim.SGD(attention.parameters(), lr=.1))
    quiet(GSE, update_every=5).check(attention, torch.optim.SGD(attention.parameters(), lr=.1))
    p = nn.Parameter(torch.zeros(2, 9))
    p.grad = torch.ones(2, 9)
    with pytest.raises(ValueError, match='sums must be given for a guided draw'): in_subset(subset_f=grabo_subset)(p, mask=torch.eye(2, 9).bool())
    model = wide()
    sparsify_model(model, .8)
    with pytest.raises(ValueError, match='holds no inputs and output gradients: call `method.enforce'): sparse_layers(model)[0].token_sums()

def test_guided_methods_are_written_and_read(tmp_path):
    m = GraEst(update_every=50)
    save_method(m, tmp_path)
    again = load_method(tmp_path)
    assert again.to_dict()==m.to_dict() and again.reads==m.reads=={'weight', 'gradient', 'tokens'}
    assert pickle.loads(pickle.dumps(m)).reads==m.reads

def test_scores_of_scores_are_found_where_they_were():
    import sparsefast.scores as old, sparsefast.draws as new
    for n in ('gumbel_noise', 'sampled', '_sampled', 'not_returning', 'uniform_subset', 'in_subset', '_in_subset'): assert getattr(old, n) is getattr(new, n)
    d = CHTs().to_dict()
    d['keep_score_f'] = dict(d['keep_score_f'], maker='sparsefast.scores.sampled')                  # as files of before have it
    assert DSTMethod.from_dict(d).to_dict()==CHTs().to_dict()
    with pytest.raises(ValueError, match='public function'): DSTMethod.from_dict(dict(keep_score_f=dict(function='sparsefast.scores.attribute')))
    with pytest.raises(AttributeError, match='no_such'): old.no_such
