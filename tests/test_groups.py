"Whole groups: counts, ties, groups of several sizes, ids of rows, kernels, heads and diagonals, and the same as loops"
import math
from functools import partial
import pytest, torch
from hypothesis import given, strategies as st
from torch import nn
from helpers import *
from sparsefast import presets
from sparsefast.groups import *
from sparsefast.methods import DSTMethod
from sparsefast.patterns import *
from sparsefast.sparsify import sparsify_model

IDS = dict(rows=row_groups, inputs=input_groups, kernels=kernel_groups, diagonals=diagonal_groups, blocks=partial(block_groups, size=(2,2)), shuffled=partial(shuffled_groups, groups=partial(block_groups, size=(2,2))),
           heads=partial(head_groups, heads=2), outputs=partial(head_groups, heads=2, dim=1))

# ------------------------------------------------------------ the numbers
def test_ids():
    assert diagonal_groups((3, 5)).tolist()==[[0,1,2,3,4],[4,0,1,2,3],[3,4,0,1,2]] and diagonal_groups((5, 3)).tolist()==[[0,4,3],[1,0,4],[2,1,0],[3,2,1],[4,3,2]]
    assert row_groups((2, 3)).tolist()==[[0]*3,[1]*3] and input_groups((2, 3)).tolist()==[[0,1,2]]*2
    k = kernel_groups((2, 3, 2, 2))
    assert k.shape==(2, 3, 2, 2) and all((k[r,c]==3*r+c).all() for r in range(2) for c in range(3))
    assert head_groups((4, 2), heads=2).tolist()==[[0]*2]*2+[[1]*2]*2 and head_groups((2, 4), heads=2, dim=1).tolist()==[[0,0,1,1]]*2
    assert block_groups((2, 4), size=(1, 2)).tolist()==[[0,0,1,1],[2,2,3,3]]
    with pytest.raises(ValueError, match='heads must divide 6, the size of dimension 0, got 4'): head_groups((6, 2), heads=4)

@pytest.mark.parametrize('name', list(IDS))
@pytest.mark.parametrize('shape', [(8, 4), (4, 8), (4, 6, 3, 3)])
def test_groups_are_of_one_size(name, shape):
    ids = IDS[name](shape)
    assert ids.shape==shape and ids.dtype==torch.int64 and ids.min()==0 and len(ids.unique())==ids.max()+1 and len(set(ids.unique(return_counts=True)[1].tolist()))==1

def test_each_diagonal_has_one_weight_of_each_short_side():
    for shape in ((6, 4), (4, 6)):
        ids = diagonal_groups(shape)
        for d in range(6): assert all((ids==d).sum(dim=shape.index(6)).eq(1))

def test_blocks_of_a_convolution_are_those_of_block_pattern():
    score = torch.rand(4, 8, 3, 3)
    for size in ((1, 4), (2, 2)): assert torch.equal(pattern_mask(partial(group_pattern, ids=partial(block_groups, size=size)), score, 96), pattern_mask(partial(block_pattern, size=size), score, 96))

# ------------------------------------------------------------ `spec2.md` 9
def test_a_diagonal_goes_and_another_comes():
    ids = diagonal_groups((3, 5))
    w = torch.tensor([[.9,-.2,.1,.4,-.3],[.2,.8,.3,-.1,.5],[-.6,.1,.7,.2,.1]])
    g = torch.tensor([[.1,.2,.5,.1,.3],[.2,.1,.1,.6,.2],[.1,.4,.1,.2,.4]])
    new = group_pattern((ids==0)|(ids==3), w.abs(), g, 3, ids=diagonal_groups, by='l2')
    assert torch.equal(new, (ids==0)|(ids==2)) and new.sum()==6

# ------------------------------------------------------------ loops
def reference(ids, mask, keep, grow, n_drop, n_grow, by):
    "One group after the other, in float64"
    n = sorted({i for i in ids if i>=0})
    at = {g: [j for j,i in enumerate(ids) if i==g] for g in n}
    def score(s, g):
        v = [s[j] for j in at[g]]
        return math.sqrt(sum(x*x for x in v)) if by=='l2' else sum(v)/(len(v) if by=='mean' else 1)
    active,stay = [g for g in n if all(mask[j] for j in at[g])],sum(mask)-n_drop
    total,sizes = stay+n_grow,{len(a) for a in at.values()}
    best = lambda s, gs: sorted(gs, key=lambda g: (-score(s, g), g))
    if len(sizes)==1:
        size, = sizes
        kept = best(keep, active)[:min(round(stay/size), len(active))]
        new = kept + best(grow, [g for g in n if g not in kept])[:max(min(round(total/size), len(n))-len(kept), 0)]
    else:
        new,left = [],stay
        for g in best(keep, active):
            if len(at[g])<=left: new,left = [*new, g],left-len(at[g])
        left += n_grow
        for g in best(grow, [g for g in n if g not in new]):
            if len(at[g])<=left: new,left = [*new, g],left-len(at[g])
    return {j for g in new for j in at[g]}

@given(st.integers(0, 999), st.sampled_from(['sum', 'mean', 'l2']), st.sampled_from([*IDS, 'own', 'gaps']), st.floats(0, 1), st.floats(0, 1))
def test_groups_equal_loops(seed, by, kind, frac, drop):
    g = torch.Generator().manual_seed(seed)
    shape = (4, 6)
    own = torch.randint(-1, 5, shape, generator=g)
    ids = dict(own=own, gaps=own*3).get(kind, IDS.get(kind))
    if kind=='gaps': ids = torch.where(ids<0, -1, ids)
    f = partial(group_pattern, ids=ids, by=by)
    room = capacity(f, torch.empty(shape, device='meta'))
    score,keep,grow = (torch.randint(0, 5, shape, generator=g).float() for _ in range(3))
    mask = pattern_mask(f, score, int(frac*room))
    active = int(mask.sum())
    n_drop = int(drop*active)
    n_grow = min(n_drop+seed%3, room-active+n_drop)
    new = f(mask, keep, grow, n_drop, n_grow)
    flat = (ids(shape) if callable(ids) else ids).flatten().tolist()
    assert fits_pattern(mask, f) and fits_pattern(new, f) and abs(active-int(frac*room))<max(map(flat.count, flat))
    assert {j for j,b in enumerate(new.flatten().tolist()) if b}==reference(flat, *(t.flatten().tolist() for t in (mask, keep, grow)), n_drop, n_grow, by)

@pytest.mark.parametrize('value', [0., math.nan, math.inf])
def test_equal_scores_go_to_the_lower_number(value):
    score = torch.full((6, 4), value)
    mask = pattern_mask(partial(group_pattern, ids=row_groups), score, 12)
    assert mask.all(1).tolist()==[True]*3+[False]*3
    new = group_pattern(mask, score, score, 4, ids=row_groups)
    assert torch.equal(new, mask)                                                             # the third went, and is the first to return

def test_a_group_with_nan_is_last():
    score = torch.ones(4, 2)
    score[1,0] = math.nan
    assert pattern_mask(partial(group_pattern, ids=row_groups), score, 6).any(1).tolist()==[True,False,True,True]
    ids = torch.tensor([[0,0],[1,1],[2,2],[2,2]])
    assert pattern_mask(partial(group_pattern, ids=ids), score, 6).any(1).tolist()==[True,False,True,True]

def test_weights_in_no_group_are_never_active_and_no_room():
    ids = torch.tensor([[0,0,-1],[1,1,-1]])
    f = partial(group_pattern, ids=ids)
    assert capacity(f, torch.rand(2, 3))==4 and pattern_mask(f, torch.rand(2, 3), 4).tolist()==[[True,True,False]]*2
    assert not fits_pattern(torch.ones(2, 3, dtype=torch.bool), f)

@pytest.mark.parametrize('ids,match', [(torch.zeros(2, 2), 'ids must be whole numbers of shape .*got torch.float32'), (torch.zeros(2, 3, dtype=torch.int64), r'got torch.int64 of shape \(2, 3\)'),
                                       (lambda shape: torch.zeros(shape, dtype=torch.bool), 'got torch.bool')])
def test_wrong_ids(ids, match):
    with pytest.raises(ValueError, match=match): pattern_mask(partial(group_pattern, ids=ids), torch.rand(2, 2), 2)

def test_wrong_score_of_groups():
    with pytest.raises(ValueError, match="by must be 'sum', 'mean' or 'l2', got 'max'"): pattern_mask(partial(group_pattern, ids=row_groups, by='max'), torch.rand(2, 2), 2)

# ------------------------------------------------------------ by every dynamic method
NAMES = [k.removesuffix('_presets') for k in vars(presets) if k.endswith('_presets') and k not in ('Static_presets', 'SRigL_presets', 'SR_STE_presets')]

@pytest.mark.parametrize('kind', ['diagonals', 'kernels'])
@pytest.mark.parametrize('name', NAMES)
def test_every_method_in_groups(name, kind):
    "The budget is exact at every update, and masks are whole groups"
    torch.manual_seed(0)
    pattern_f = partial(group_pattern, ids=IDS[kind])
    model = nn.Sequential(nn.Unflatten(1, (4,2,1)), nn.Conv2d(4, 8, (2,1)), nn.ReLU(), nn.Flatten(), nn.Linear(8, 12), nn.ReLU(), nn.Linear(12, 4))
    m = DSTMethod(**{**getattr(presets, f'{name}_presets'), 'batches_per_update': 4, 'replaces_step': False, 'pattern_f': pattern_f, **({'grad_steps': 4} if name=='SEFT' else {})})
    sparsify_model(model, .5, **m.sparsify_kwargs(.5))
    opt,seen,start = torch.optim.SGD(model.parameters(), lr=.05, momentum=.9),[],masks(model)
    def look(step):
        assert all(fits_pattern(mask, pattern_f) for mask in masks(model)) and masked_are_zero(model)
        seen.append(sum(nnz(model)))
    plain_loop(model, opt, m, 40, look)
    sizes = [4 if kind=='kernels' and mask.dim()==4 else 1 if kind=='kernels' else min(len(mask), mask[0].numel()) for mask in masks(model)]
    if not (m.sparsity_sched_f or m.redistribute_f or m.grow_share_f): assert len(set(seen))==1
    too_few = name=='Chase' and kind=='diagonals'                                            # it moves fewer weights than a diagonal has
    assert same_masks(start, masks(model))==too_few and abs(seen[-1]-.5*sum(mask.numel() for mask in masks(model)))<sum(sizes)
