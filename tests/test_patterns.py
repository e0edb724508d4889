"Patterns: never violated, exact in number, and the same as plain loops"
import gc, math, weakref
from functools import partial
import pytest, torch
from hypothesis import given, strategies as st
import reference
from sparsefast.masks import n_active, sparse_mask, top_k_mask
from sparsefast.patterns import *

def fibres(shape):
    "Flat indices along dimension 1, a list for each output and place in the kernel, outputs first"
    idx = torch.arange(math.prod(shape)).view(shape)
    return idx.movedim(1, -1).reshape(-1, shape[1]).tolist() if len(shape)>2 else idx.tolist()

def chance(shape, gen): return torch.rand(shape, generator=gen, device='cpu').to(torch.get_default_device())

@st.composite
def problems(draw, m=4, full=None):
    "(shape, mask, keep scores, grow scores, number to drop): scores with many ties, linear or convolution"
    shape = draw(st.sampled_from([(3,8), (1,4), (5,12), (2,4,3), (4,8,2,2), (1,8,1,1)]))
    gen = torch.Generator().manual_seed(draw(st.integers(0, 10_000)))
    top = draw(st.sampled_from([1, 3, 1000]))
    score = lambda: torch.randint(top, shape, generator=gen, device='cpu').float().to(torch.get_default_device())
    return shape, gen, score(), score(), draw(st.floats(0, 1))

@given(st.integers(0, 9999), st.integers(0, 60), st.integers(0, 30), st.integers(0, 30))
def test_a_known_count_changes_nothing(seed, n_on, n_drop, n_grow):
    g = torch.Generator().manual_seed(seed)
    keep,grow = chance((6, 10), g),chance((6, 10), g)
    mask = top_k_mask(chance((6, 10), g), n_on)
    n_drop = min(n_drop, n_on)
    n_grow = min(n_grow, 60-n_on+n_drop)
    assert torch.equal(drop_grow(mask, keep, grow, n_drop, n_grow, nnz=n_on), drop_grow(mask, keep, grow, n_drop, n_grow))

@given(st.integers(0, 9999), st.integers(0, 60), st.integers(0, 30), st.integers(0, 30), st.sampled_from([1, 3, 1000]))
def test_functions_give_the_masks_of_their_scores(seed, n_on, n_drop, n_grow, top):
    "Each is called at most once; the grow score sees what survived the drop, and the mask it was given is not changed later"
    g = torch.Generator().manual_seed(seed)
    keep,grow = (torch.randint(top, (6, 10), generator=g, device='cpu').float().to(torch.get_default_device()) for _ in range(2))
    mask = top_k_mask(chance((6, 10), g), n_on)
    n_drop = min(n_drop, n_on)
    n_grow = min(n_grow, 60-n_on+n_drop)
    survivors,calls,given_masks = drop_grow(mask, keep, grow, n_drop, 0), [], []
    def keep_f():
        calls.append('keep')
        return keep
    def grow_f(kept):
        calls.append('grow')
        given_masks.append(kept)
        assert kept.dtype==torch.bool and torch.equal(kept, survivors)
        return grow
    want = drop_grow(mask, keep, grow, n_drop, n_grow)
    assert torch.equal(drop_grow(mask, keep_f, grow_f, n_drop, n_grow, nnz=n_on), want) and calls==['keep', 'grow'][:1+(n_grow>0)]      # what nothing needs is not computed
    assert all(torch.equal(kept, survivors) for kept in given_masks)
    assert torch.equal(drop_grow(mask, keep_f, grow, n_drop, n_grow), want) and torch.equal(drop_grow(mask, keep, grow_f, n_drop, n_grow), want)

def test_grow_score_may_depend_on_what_survived():
    mask,score = torch.tensor([[1,1,0,0],[1,1,0,0]]).bool(), torch.tensor([[4.,3,2,1],[8,7,6,5]])
    fewest = lambda kept: -kept.sum(1, keepdim=True).expand(2, 4).float()                    # grow where fewest are left, from the left
    assert drop_grow(mask, score, fewest, 2).int().tolist()==[[1,1,0,0],[1,1,0,0]]
    assert drop_grow(mask, -score, fewest, 2).int().tolist()==[[1,1,0,0],[1,1,0,0]]
    assert drop_grow(mask, score, lambda kept: score-10*kept.any(1, keepdim=True), 2).int().tolist()==[[1,1,0,0],[1,1,0,0]]
    assert drop_grow(mask, score, lambda kept: kept.any(1, keepdim=True)*score, 2).int().tolist()==[[0,0,0,0],[1,1,1,1]]

@pytest.mark.parametrize('size', [(30,), (400, 500)])                                        # with and without a sample of the scores
def test_only_one_score_is_in_memory(size):
    "The first score is gone when the second is computed"
    mask,seen = torch.rand(size)<.1, []
    def keep_f():
        score = torch.rand(size)
        seen.append(weakref.ref(score))
        return score
    def grow_f(kept):
        gc.collect()
        assert seen[0]() is None
        return torch.rand(size)
    n = int(mask.sum())
    assert drop_grow(mask, keep_f, grow_f, n//3).sum()==n

# ------------------------------------------------------------ N of each M
def nm_reference(shape, mask, keep, grow, n_drop, n_grow, n, m):
    "Loops over groups; positions as flat indices"
    groups = [f[i:i+m] for f in fibres(shape) for i in range(0, len(f), m)]
    best = lambda idx, s: sorted(idx, key=lambda i: (-s[i], i))                              # ties go to the lower flat index
    active = [i for i,b in enumerate(mask) if b]
    kept = set(best(active, keep)[:len(active)-n_drop])
    room = {j: n-sum(i in kept for i in g) for j,g in enumerate(groups)}
    cand = [i for j,g in enumerate(groups) for i in best([i for i in g if i not in kept], grow)[:room[j]]]
    return kept|set(best(cand, grow)[:n_grow])

@given(problems(), st.sampled_from([(2,4), (1,4), (3,4), (1,2)]), st.booleans())
def test_nm_equals_loops(problem, nm, full):
    (shape,gen,keep,grow,frac),(n,m) = problem,nm
    f = partial(nm_pattern, n=n, m=m)
    cap = math.prod(shape)*n//m
    mask = pattern_mask(f, chance(shape, gen), cap if full else int(frac*cap))
    k = int(frac*int(mask.sum()))
    new = f(mask, keep, grow, k)
    groups = [fi[i:i+m] for fi in fibres(shape) for i in range(0, len(fi), m)]
    flat = new.flatten()
    assert int(new.sum())==int(mask.sum()) and all(int(flat[g].sum())<=n for g in groups) and fits_pattern(new, f)
    if full: assert all(int(flat[g].sum())==n for g in groups)
    want = nm_reference(shape, *(t.flatten().tolist() for t in (mask, keep, grow)), k, k, n, m)
    assert {i for i,b in enumerate(flat.tolist()) if b}==want

def test_nm_runs_along_input_channels():
    score = torch.zeros(1, 8, 2, 2)
    score[0,:2,0,0] = score[0,6:,0,0] = 1                                                     # both groups of one kernel position
    mask = pattern_mask(nm_pattern, score, 4)
    assert mask.sum()==4 and mask[0,[0,1,6,7],0,0].all()

@given(problems(), st.integers(1, 4))
def test_nm_gradual_narrows(problem, n):
    shape,gen,keep,grow,frac = problem
    f,N = partial(nm_pattern, n=n, m=4, gradual=True),math.prod(shape)
    mask = torch.ones(shape, dtype=torch.bool)
    for total in range(N, N*n//4-1, -max(1, N//7)):
        mask = f(mask, keep, grow, int(mask.sum())-total, 0)
        allowed = max(n, math.ceil(total*4/N))
        assert int(mask.sum())<=total and all(int(mask.flatten()[fi[i:i+4]].sum())<=allowed for fi in fibres(shape) for i in range(0, len(fi), 4))

@pytest.mark.parametrize('shape', [(4,6), (8,), (16,3,3,3)])
def test_nm_that_does_not_fit(shape):
    with pytest.raises(ValueError, match='2:4 needs a multiple of 4 inputs.*exclude the layer'): pattern_mask(nm_pattern, torch.rand(shape), 4)

def test_nm_without_room():
    with pytest.raises(ValueError, match='has room for 16 of 32 weights, not for 17: use a sparsity of 0.5 or more'): pattern_mask(nm_pattern, torch.rand(4, 8), 17)

# ------------------------------------------------------------ blocks
def block_reference(shape, mask, keep, grow, n_drop, n_grow, size):
    rows,cols = shape[0],math.prod(shape[1:])
    matrix = torch.arange(rows*cols).view(shape).movedim(1, -1).reshape(rows, cols) if len(shape)>2 else torch.arange(rows*cols).view(shape)
    blocks = [matrix[i:i+size[0], j:j+size[1]].flatten().tolist() for i in range(0, rows, size[0]) for j in range(0, cols, size[1])]
    area = size[0]*size[1]
    total = sum(mask)-n_drop
    active = [j for j,b in enumerate(blocks) if all(mask[i] for i in b)]
    kept = reference.top_k([sum(keep[i] for i in b) for b in blocks], min(round(total/area), len(active)), active)
    new = kept|reference.top_k([sum(grow[i] for i in b) for b in blocks], round((total+n_grow)/area)-len(kept), [j for j in range(len(blocks)) if j not in kept])
    return {i for j in new for i in blocks[j]}

@given(problems(), st.sampled_from([(1,4), (1,2), (1,1)]))
def test_blocks_equal_loops(problem, size):
    shape,gen,keep,grow,frac = problem
    f = partial(block_pattern, size=size)
    mask = pattern_mask(f, chance(shape, gen), int(frac*math.prod(shape)))
    k = int(frac*int(mask.sum()))
    new = f(mask, keep, grow, k)
    assert int(new.sum())==int(mask.sum()) and fits_pattern(new, f)
    assert {i for i,b in enumerate(new.flatten().tolist()) if b}==block_reference(shape, *(t.flatten().tolist() for t in (mask, keep, grow)), k, k, size)

@pytest.mark.parametrize('size', [(16,16), (32,32), (1,4), (4,1)])
def test_block_sizes(size):
    f,n = partial(block_pattern, size=size),n_active(64*64, .75)
    mask = pattern_mask(f, torch.rand(64, 64), n)
    assert mask.sum()==n and fits_pattern(mask, f)
    blocks = mask.view(64//size[0], size[0], 64//size[1], size[1]).transpose(1, 2).flatten(2).sum(2)
    assert set(blocks.flatten().tolist())=={0, size[0]*size[1]}

def test_blocks_of_a_convolution_are_channels():
    score = torch.zeros(2, 4, 1, 3)
    score[1,:,0,2] = 1
    assert torch.equal(pattern_mask(partial(block_pattern, size=(1,4)), score, 4), score.bool())

def test_blocks_that_do_not_divide():
    with pytest.raises(ValueError, match=r'blocks of 16x16 do not divide a weight of shape \(10, 32\), a matrix of 10x32'):
        pattern_mask(partial(block_pattern, size=(16,16)), torch.rand(10, 32), 64)

# ------------------------------------------------------------ constant fan-in
def fan_in_reference(rows, fan_in, mask, keep, grow, n_drop, n_grow, ablate):
    "SRigL's update (spec 6.1), cutting the smallest, in loops"
    active = [i for i,m in enumerate(mask) if m]
    n_keep = len(active)-n_drop
    total = n_keep+n_grow
    kept = reference.top_k(keep, n_keep, active)
    salient = kept|reference.top_k(grow, total-n_keep)
    count = [sum(r*fan_in<=i<(r+1)*fan_in for i in salient) for r in range(rows)]
    least = max(1, int(ablate*(total//rows)) if ablate<1 else ablate) if ablate else 0
    by_count = sorted(range(rows), key=lambda r: (-count[r], r))
    stay = {r for r in range(rows) if count[r]>=least}|set(by_count[:min(total//fan_in+1, rows)])
    stay = set([r for r in by_count if r in stay][:min(total, len(stay))])
    if not (n_drop or n_grow): stay = {r for r in range(rows) if any(mask[r*fan_in:(r+1)*fan_in])}     # asked to change nothing, it changes nothing
    k = min(total//max(len(stay), 1), fan_in)
    new = set()
    for r in stay:
        row = range(r*fan_in, (r+1)*fan_in)
        mine = reference.top_k(keep, k, [i for i in row if i in kept])
        new |= mine|reference.top_k(grow, k-len(mine), [i for i in row if i not in mine])
    return new, k, stay

@given(problems(), st.sampled_from([0, .3, .95, 2]), st.floats(.1, .9))
def test_fan_in_equals_loops(problem, ablate, density):
    shape,gen,keep,grow,frac = problem
    rows,fan_in = shape[0],math.prod(shape[1:])
    f,total = partial(fan_in_pattern, ablate=ablate),max(rows, int(density*rows*fan_in))
    mask = pattern_mask(f, chance(shape, gen), total)
    assert (mask.flatten(1).sum(1)==total//rows).all()
    for _ in range(2):                                                                       # the second time some rows may be gone
        nnz = int(mask.sum())
        k = int(frac*nnz)
        new = f(mask, keep, grow, k, total-nnz+k)
        want,fan,stay = fan_in_reference(rows, fan_in, *(t.flatten().tolist() for t in (mask, keep, grow)), k, total-nnz+k, ablate)
        assert {i for i,b in enumerate(new.flatten().tolist()) if b}==want
        per_row = new.flatten(1).sum(1)
        assert set(per_row.tolist())<={0, fan} and int((per_row>0).sum())==len(stay) and int(new.sum())<=total and fits_pattern(new, f)
        mask,keep,grow = new,grow,keep

@pytest.mark.parametrize('shape,budget,gone,k,k_after,least', [((768,3072), 235_929, 268, 307, 471, 92), ((100,300), 2_999, 40, 29, 49, 8), ((64,27), 172, 0, 2, 2, 1),
                                                              ((10,100), 99, 0, 9, 9, 2)])
def test_fan_in_vectors(shape, budget, gone, k, k_after, least):
    "spec 6.1: fan-in, and the number of salient weights below which a neuron goes"
    mask = pattern_mask(fan_in_pattern, torch.rand(shape), budget)
    assert (mask.sum(1)==k).all()
    keep,grow = torch.rand(shape)+1, torch.zeros(shape)
    nnz = int(mask.sum())
    for n_salient,rows_left in ((least-1, shape[0]-gone), (least, shape[0])):
        if k==least: continue
        scores = keep.clone()                                                                # the first rows have so many salient weights
        place = mask[:gone].cumsum(1)
        scores[:gone][mask[:gone]&(place>n_salient)] = 0.
        n_keep = nnz-gone*(k-n_salient)
        new = fan_in_pattern(mask, scores, grow.index_fill(0, torch.arange(gone, shape[0]), 1.), nnz-n_keep, budget-n_keep)
        assert int((new.sum(1)>0).sum())==rows_left
        if n_salient<least: assert set(new.sum(1).tolist())=={0, k_after} if gone else {k_after}

def test_fan_in_ablated_neuron_comes_back():
    torch.manual_seed(0)
    mask = pattern_mask(fan_in_pattern, torch.rand(6, 10), 12)
    keep = torch.rand(6, 10); keep[0] = 0
    gone = fan_in_pattern(mask, keep, keep, 4)
    assert not gone[0].any()
    back = fan_in_pattern(gone, keep, torch.zeros(6, 10).index_fill(0, torch.tensor([0]), 1.), 4, 4+12-int(gone.sum()))
    assert back[0].sum()==2 and (back.sum(1)==2).all()

def test_fan_in_last_layer_keeps_its_classes():
    mask = pattern_mask(fan_in_pattern, torch.rand(6, 10), 12)
    keep = torch.rand(6, 10); keep[0] = 0
    assert (fan_in_pattern.last(mask, keep, keep, 4).sum(1)==2).all()

def test_fan_in_last_layer_is_never_emptied():
    mask = pattern_mask(fan_in_pattern, torch.rand(6, 10), 12)
    with pytest.raises(ValueError, match='5 weights are fewer than one for each of the 6 rows'): fan_in_pattern.last(mask, torch.rand(6, 10), torch.rand(6, 10), 7, 0)

@pytest.mark.parametrize('ablate', [0, .3, .95, 1, 8])
@pytest.mark.parametrize('per_row', [(3,3,3,3), (8,8,0,0), (2,0,2,0), (8,8,8,8), (0,0,0,0)])
def test_fan_in_is_about_equal_rows_alone(ablate, per_row):
    "Asked to change nothing, no row goes, however few weights it has"
    mask = torch.arange(8)<torch.tensor(per_row)[:,None]
    assert fits_pattern(mask, partial(fan_in_pattern, ablate=ablate))

def test_fan_in_too_few():
    with pytest.raises(ValueError, match='5 weights are fewer than one for each of the 6 rows.*at most 0.9'): pattern_mask(fan_in_pattern, torch.rand(6, 10), 5)

# ------------------------------------------------------------ all
ALL = [drop_grow, nm_pattern, partial(block_pattern, size=(1,4)), fan_in_pattern]

@pytest.mark.parametrize('f', ALL)
@pytest.mark.parametrize('value', [0., float('nan'), float('inf')])
def test_equal_scores(f, value):
    "All the same, or no numbers: exact all the same"
    score = torch.full((4,8), value)
    mask = pattern_mask(f, torch.rand(4, 8), 16)
    new = f(mask, score, score, 4)
    assert fits_pattern(new, f) and (new.sum()==16 or f is fan_in_pattern and 12<new.sum()<16)       # where a row goes, the others may not divide the rest

@pytest.mark.parametrize('f', ALL)
def test_nothing_to_do(f):
    mask = pattern_mask(f, torch.rand(4, 8), 16)
    assert torch.equal(f(mask, torch.rand(4, 8), torch.rand(4, 8), 0), mask)

@pytest.mark.parametrize('f', ALL[1:])
def test_fits_pattern_can_say_no(f):
    mask = torch.zeros(4, 8, dtype=torch.bool)
    mask[0,:3] = mask[1,3] = True
    assert not fits_pattern(mask, f)

@pytest.mark.parametrize('f', ALL)
def test_one_row(f):
    mask = pattern_mask(f, torch.rand(1, 8), 4)
    assert mask.sum()==4 and fits_pattern(f(mask, torch.rand(1, 8), torch.rand(1, 8), 2), f)

def test_wrong_options():
    "Refused by the pattern and by its capacity"
    w = torch.rand(4, 8)
    for f,match in ((partial(nm_pattern, n=5, m=4), 'n:m must be whole numbers with 1 <= n <= m, such as 2:4, got 5:4'), (partial(nm_pattern, n=0), 'got 0:4'),
                    (partial(block_pattern, size=4), r'size of blocks must be two whole numbers, rows and columns, such as \(1, 4\), got 4'), (partial(block_pattern, size=(0,4)), r'got \(0, 4\)')):
        for call in (lambda: pattern_mask(f, w, 8), lambda: capacity(f, w)):
            with pytest.raises(ValueError, match=match): call()

@pytest.mark.parametrize('f', ALL)
def test_transposed(f):
    mask,keep,grow = pattern_mask(f, torch.rand(4, 8), 16), torch.rand(4, 8), torch.rand(4, 8)
    turned = transposed_pattern(f)
    new = turned(mask.t(), keep.t(), grow.t(), 4)
    assert new.is_contiguous() and fits_pattern(new, turned)
    if f is not drop_grow: assert torch.equal(new.t(), f(mask, keep, grow, 4))

def test_earlier_names(): assert follows is fits_pattern

def test_capacity():
    w = torch.rand(4, 8)
    assert [capacity(f, w) for f in (drop_grow, nm_pattern, partial(nm_pattern, n=1, m=4), partial(nm_pattern, gradual=True), fan_in_pattern)]==[32, 16, 8, 16, 32]
