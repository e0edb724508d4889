"Presets as functions and by name; what the methods do is in `test_catalogue`"
import dataclasses, inspect, pickle, re, warnings
import pytest, torch
from fastcore.docments import docments
from sparsefast import presets
from sparsefast.methods import DSTMethod
from sparsefast.presets import *
from sparsefast.scores import weight_magnitude, random_score

PRESETS = {k.removesuffix('_presets'): v for k,v in vars(presets).items() if k.endswith('_presets')}
NAMES = 'Static SET SET_original SNFS RigL SET_ITOP RigL_ITOP DSR MEST MEST_soft TopKAST GMP GMP_lm GraNet GraNet_half Chase ACDC SRigL SR_STE RigL_avg'.split()
NAMES += 'CHTs CHTss GSE SEFT'.split()
each = pytest.mark.parametrize('name', NAMES)
def f(name): return getattr(presets, name)

def test_every_preset_has_its_function(): assert sorted(PRESETS)==sorted(NAMES) and {*NAMES, 'as_method'} <= set(presets.__all__)

# ------------------------------------------------------------ functions
@each
def test_function_equals_dict(name):
    before = dict(PRESETS[name])
    assert type(f(name)()) is DSTMethod and f(name)()==DSTMethod(**PRESETS[name])
    assert f(name)(seed=3, stop_pct=.5)==DSTMethod(**{**PRESETS[name], 'seed': 3, 'stop_pct': .5})
    assert PRESETS[name]==before

@each
def test_update_every_is_batches_per_update(name):
    for n in (40, 1/8, None): assert f(name)(update_every=n)==f(name)(batches_per_update=n)==DSTMethod(**{**PRESETS[name], 'batches_per_update': n})
    with pytest.raises(TypeError, match='update_every must be given without batches_per_update.*got 40 and 50: leave one out'): f(name)(update_every=40, batches_per_update=50)

@each
def test_signature_shows_the_settings(name):
    "Every setting of `DSTMethod`, by keyword, with the default that the preset has"
    m,shown = f(name)(), inspect.signature(f(name)).parameters
    assert set(shown)=={field.name for field in dataclasses.fields(DSTMethod)}|{'update_every'} and all(p.kind is p.KEYWORD_ONLY for p in shown.values())
    assert all(p.default==getattr(m, 'batches_per_update' if k=='update_every' else k) for k,p in shown.items())
    assert all(docments(f(name)).get(k) for k in shown)

@each
def test_name_and_docstring_are_real(name):
    "A sentence, then authors, year, title and link; then the settings"
    g = f(name)
    assert (g.__name__, g.__qualname__, g.__module__)==(name, name, 'sparsefast.presets') and pickle.loads(pickle.dumps(g)) is g
    if name!='Static': assert re.search(r'(?s)^[A-Z][^\n]+\n\n.*\b20\d\d, \*.+\*.*https://arxiv.org/abs/\d{4}\.\d{5}\n\nArgs:\n    update_every: ', inspect.getdoc(g))

def test_what_is_printed():
    "A call with the user's keywords; `print` adds in comments when, how much, and by what"
    assert repr(RigL(update_every=50))=='RigL(update_every=50)' and repr(RigL())=='RigL()'
    assert str(RigL(update_every=50)).splitlines()==['RigL(update_every=50)', '  # an update every 50 steps, until 75% of training', '  # replaces 0.3 of the active weights (cosine_anneal)', '  # drops the lowest weight_magnitude, grows the highest gradient_magnitude']
    assert '1/12 of training' in str(RigL()) and 'every epoch, until the end of training' in str(SET(update_every=None)) and 'every step,' in str(TopKAST()) and '0.123 of training' in str(RigL(update_every=.123))
    assert 'sparsity from 0.0, by inverse_power_anneal between 0% and 75% of training' in str(GMP()) and 'replaces' not in str(GMP()) and 'no updates' in str(Static())
    assert 'cosine_anneal to 0.005' in str(SNFS()) and repr(DSTMethod(keep_score_f=random_score, batches_per_update=8)).endswith('batches_per_update=8)')

@each
def test_what_is_printed_can_be_typed(name):
    m = f(name)()
    assert eval(str(m), vars(presets))==m and len(str(m).splitlines())<=5

def test_misspelt_settings_name_those_like_it():
    with pytest.raises(TypeError, match="unknown setting 'update_evry': did you mean update_every?"): RigL(update_evry=3)
    with pytest.raises(TypeError, match="unknown setting 'update_every': did you mean batches_per_update?"): DSTMethod(update_every=3)

def test_wrong_settings_are_refused_as_by_the_method():
    with pytest.raises(TypeError, match="unknown setting 'sed'"): RigL(sed=1)
    with pytest.raises(ValueError, match='stop_pct'): RigL(stop_pct=2)
    with pytest.raises(TypeError): RigL(50)

def test_a_preset_without_an_interval(monkeypatch):
    "What a dict does not name has the default of `DSTMethod`, in function, signature and name"
    @presets._function_of(own := dict(keep_score_f=weight_magnitude, grow_score_f=random_score))
    def own_method(**kwargs): "Ours"
    assert own_method()==DSTMethod(**own)==as_method(own) and own_method().batches_per_update is None
    assert own_method(update_every=30)==own_method(batches_per_update=30)==DSTMethod(**own, batches_per_update=30)
    assert inspect.signature(own_method).parameters['update_every'].default is None
    monkeypatch.setattr(presets, 'Own_presets', own, raising=False)
    assert as_method('own')==DSTMethod(**own)

# ------------------------------------------------------------ by name
@each
def test_as_method(name):
    want = DSTMethod(**PRESETS[name])
    assert as_method(want) is want and as_method(PRESETS[name])==want
    for n in (name, name.lower(), name.upper(), f'{name}_presets', f'{name}_presets'.lower(), f'{name}_PRESETS'): assert as_method(n)==want

@pytest.mark.parametrize('word,match', [('rigel', "must be the name of a preset, got 'rigel': did you mean rigl"), ('set_orignal_presets', "got 'set_orignal_presets': did you mean set_original"),
                                        ('', "got '': choose from static, set, "), ('zzz', "got 'zzz': choose from static")])
def test_as_method_of_an_unknown_name(word, match):
    with pytest.raises(ValueError, match=match): as_method(word)

@pytest.mark.parametrize('what', [None, 3, RigL, [RigL_presets], DSTMethod, torch.nn.Linear(2, 2)], ids=lambda w: type(w).__name__)
def test_as_method_of_something_else(what):
    with pytest.raises(TypeError, match='method must be a DSTMethod, a preset or the name of one, got '): as_method(what)

def test_as_method_checks_a_dict_as_the_method_does():
    with pytest.raises(TypeError, match="unknown setting 'keep'"): as_method(dict(keep=1))
