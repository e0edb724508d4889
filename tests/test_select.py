"Which layers: names, places, types, modules; and what matches nothing"
from collections import OrderedDict
from types import SimpleNamespace
import pytest, torch
from hypothesis import given, strategies as st
from torch import nn
from sparsefast.select import *

def model():
    conv = lambda i,o: nn.Sequential(nn.Conv2d(i, o, 3), nn.BatchNorm2d(o), nn.ReLU())
    return nn.Sequential(OrderedDict(stem=conv(3, 8), body=nn.Sequential(conv(8, 8), conv(8, 8)), head=nn.Sequential(nn.Flatten(), nn.Linear(8, 8), nn.Linear(8, 4)), header=nn.Linear(4, 4)))
NAMES = ['stem.0', 'body.0.0', 'body.1.0', 'head.1', 'head.2', 'header']

def names(m, which, **kw):
    all_names = weight_names(m)
    return [all_names[w] for w in select_weights(m, which, **kw)]

@pytest.mark.parametrize('which,want', [
    ('stem.0', NAMES[:1]), ('stem', NAMES[:1]), ('body', NAMES[1:3]), ('head', NAMES[3:5]), ('head*', NAMES[3:]), ('head.*', NAMES[3:5]), ('*', NAMES), ('head.1.weight', NAMES[3:4]),
    ('body.?.0', NAMES[1:3]), ('body.[1-9]', NAMES[2:3]), (0, NAMES[:1]), (-1, NAMES[-1:]), (5, NAMES[-1:]), (nn.Linear, NAMES[3:]), (nn.Conv2d, NAMES[:3]), ([-1, 'stem', nn.Conv2d], NAMES[:3]+NAMES[-1:]),
    ((0, 0), NAMES[:1])])
def test_selected(which, want): assert names(model(), which)==want

def test_modules():
    m = model()
    assert names(m, m.head)==NAMES[3:5] and names(m, m.body[1][0])==['body.1.0'] and names(m, [m.stem, m.header])==['stem.0', 'header'] and names(m, m)==NAMES

@pytest.mark.parametrize('which,near', [('haed', "'head.1'"), ('stem.1', "'stem.0'"), ('body.0.1', "'body.0.0'"), (6, "0 to 5: 'stem.0'"), (-7, '0 to 5'), (nn.Conv1d, "'stem.0'"), (nn.ReLU(), 'there are 6'),
                                        (True, 'there are 6'), (None, 'there are 6'), (2.5, 'there are 6'), ('', 'there are 6')])
def test_nothing_matches(which, near):
    with pytest.raises(ValueError, match='no layer of this model that can be sparse is') as e: select_weights(model(), which)
    assert near in str(e.value)

def test_one_wrong_answer_among_right_ones():
    with pytest.raises(ValueError, match="'boby'.*'body.0.0'"): select_weights(model(), ['stem', 'boby'])

def test_a_layer_of_another_model():
    with pytest.raises(ValueError, match='no layer of this model'): select_weights(model(), model().stem)

def test_additional_types():
    m = nn.Sequential(nn.Embedding(4, 4), nn.Linear(4, 4))
    assert names(m, 0)==['1'] and len(select_weights(m, nn.Embedding, [nn.Embedding]))==1
    with pytest.raises(ValueError): select_weights(m, nn.Embedding)

def test_a_single_layer_has_a_name(): assert list(weight_names(nn.Linear(2, 2)).values())==['Linear'] and len(select_weights(nn.Linear(2, 2), 'Linear'))==1

@given(st.lists(st.sampled_from(NAMES), min_size=1, max_size=6))
def test_order_is_the_models_and_each_comes_once(which): assert names(model(), which)==[n for n in NAMES if n in which]

def test_a_learner_in_place_of_its_model():
    m = model()
    learn = SimpleNamespace(model=m)
    assert weight_names(learn)==weight_names(m) and select_weights(learn, 'head')==select_weights(m, m.head)
