"The public names of `sparsefast.core`, with their signatures and defaults"
import importlib, inspect
import pytest
import sparsefast.core as core
from sparsefast import callback, distributions, masks, methods, scores, sparsify

REQ = inspect.Parameter.empty
API = dict(
    sparse_mask               = dict(sizes=REQ, sparsity=REQ),
    sparse_mask_like          = dict(param=REQ, sparsity=REQ),
    maybe_float               = dict(num=REQ),
    sparse_params             = dict(module=REQ),
    apply_masks               = dict(module=REQ, args='*', inplace=True),
    is_sparseable_module      = dict(m=REQ, additional_types=[]),
    sparseable_modules        = dict(model=REQ, additional_types=[]),
    uniform_sparsity          = dict(params=REQ, model_sparsity=REQ),
    first_layer_dense_uniform = dict(params=REQ, model_sparsity=REQ),
    erdos_renyi_sparsity      = dict(params=REQ, model_sparsity=REQ, include_kernel=True, erk_power_scale=1.0),
    sparsify_model            = dict(model=REQ, model_sparsity=None, sparse_f=distributions.uniform_sparsity, enforce_mask=True),
    random_score              = dict(p=REQ, kwargs='**'),
    weight_magnitude          = dict(p=REQ, kwargs='**'),
    gradient_magnitude        = dict(p=REQ, kwargs='**'),
    gradient_momentum         = dict(p=REQ, opt=REQ, kwargs='**'),
    top_k_mask                = dict(t=REQ, n_keep=REQ),
    DynamicSparseTrainingCallback = dict(sparse_modules=None, batches_per_update=None, initial_drop_grow_pct=0.3, stop_pct=0.75,
                                         keep_score_f=scores.weight_magnitude, grow_score_f=scores.gradient_magnitude))
PRESETS = ['SET_presets','SNFS_presets','RigL_presets']
VAR = {inspect.Parameter.VAR_POSITIONAL: '*', inspect.Parameter.VAR_KEYWORD: '**'}

@pytest.mark.parametrize('name', API)
def test_signature(name):
    found  = {n: VAR.get(p.kind, p.default) for n,p in inspect.signature(getattr(core, name)).parameters.items()}
    wanted = API[name]
    fixed  = {n: v for n,v in wanted.items() if v!='**'}
    assert list(found)[:len(fixed)]==list(fixed) and {n: found[n] for n in fixed}==fixed
    assert all(found[n] is not REQ for n in list(found)[len(fixed):])                    # what follows is optional
    assert '**' not in wanted.values() or '**' in found.values()

@pytest.mark.parametrize('name', [*API, *PRESETS])
def test_in_all(name): assert name in core.__all__ and hasattr(core, name)

def test_star_import():
    scope = {}
    exec('from sparsefast.core import *', scope)
    assert {*API, *PRESETS} <= set(scope)

def test_core_re_exports_the_rooms():
    for room in (masks, distributions, scores, sparsify, methods, callback):
        for name in room.__all__:
            if name in core.__all__: assert getattr(core, name) is getattr(room, name)

@pytest.mark.parametrize('name', PRESETS)
def test_presets_are_plain_dicts_of_the_callbacks_keywords(name):
    preset = getattr(core, name)
    assert type(preset) is dict and set(preset) <= set(inspect.signature(core.DynamicSparseTrainingCallback).parameters)
    copy = dict(preset)
    core.DynamicSparseTrainingCallback(**preset)
    assert preset==copy

@pytest.mark.parametrize('name', API)
def test_documented(name):
    f = getattr(core, name)
    assert f.__doc__ and f.__doc__.strip()

def test_names_of_the_readme():
    from sparsefast import all as everything
    assert core.RigL_avg is everything.RigL_avg and {'RigL_avg'} <= {*core.__all__} and {'RigL_avg', 'zero_state'} <= {*everything.__all__}

def test_version():
    import sparsefast
    assert sparsefast.__version__.count('.')>=2

# ------------------------------------------------------------ names that have a room of their own now
MOVED = dict(draws=('scores', 'gumbel_noise sampled not_returning uniform_subset in_subset'), resets=('optim', 'zero_state call_reset reset_state'),
             exchange=('plan', 'scores pattern_of exchange'), amounts=('plan', 'max_active target_counts'))
@pytest.mark.parametrize('room', MOVED)
def test_moved_names_are_found_where_they_were(room):
    before,names = MOVED[room]
    new,old = (importlib.import_module(f'sparsefast.{m}') for m in (room, before))
    for n in names.split(): assert getattr(old, n) is getattr(new, n)
    if room in ('draws', 'resets'):                                                      # public rooms, also by a star
        scope = {}
        exec(f'from sparsefast.{before} import *', scope)
        assert all(scope[n] is getattr(new, n) for n in names.split())
        with pytest.raises(AttributeError, match='no_such_name'): old.no_such_name
