"""Which replies of the teacher are taken as traces, and why others are not."""

import pytest

import hicodet
from engine.traces.acceptance import accept_trace
from tests.replies import THINK, reply

ACCEPTED = """\
There is one person. The person is riding a bicycle. Bicycle: ride, sit on.
Two cyclists are riding bicycles
There are two skiers
Three baseball players
One surfer is riding a wave on a surfboard
A baby is brushing his teeth
A lady holds an umbrella
Two men are hugging each other. A man hugs another person.
1. 3 people. 2. They stand. 3. Skis. 4. They wear skis.
A woman sits at a dining table; no interaction with the chair.
There are several children near a dog, not really interacting with it.
Several kids are playing soccer with a ball on a field.
A toddler feeds a giraffe through the fence of the zoo.
The goalie blocks the ball that the striker has kicked.
A snowboarder in mid-air grabs the edge of the board.
Two policemen direct traffic beside a parked motorcycle.
A fisherman sits in a small boat and holds a rod.
The batter swings, the catcher crouches behind him and the umpire watches.
A crowd of spectators watches a race of horses and their jockeys.
A bride and a groom cut a large white cake with one knife.
One rides, one pushes and one carries it uphill.
One is pouring, another is drinking.
Nobody touches the elephant; four tourists look on from a jeep.
Someone's hands hold a cell phone; the face is not visible.
Riding a bicycle, holding an umbrella.
The sheep are being sheared by a farmer in overalls.
Person: 2. Doing: eating. Object: pizza. Verbs: eat, hold.
A zebra and a giraffe stand in the grass. Verbs: watch.
People are waiting beside the bus; one of them boards it.
I can see two people. The first is talking on a cell phone.
I cannot tell whether the woman opens the umbrella or closes it; she carries it.
I can\u2019t see what the second person holds, but the first one repairs a bicycle.
I cannot help but notice three teenagers with skateboards.
The boy cannot reach the ball, so the girl helps him.
A sign behind the man says "Sorry, we are closed"; he locks his bike.
How many people are in the image? Four. What do they do? They row a boat.
The image shows an airplane at the gate and workers who load it.
<object class>: laptop. The student is typing on it.
There are no people close to the train, only its driver.
A skydiver hangs in the air and a wakeboarder looks up.
Three monks stand under umbrellas.
There is one person. I cannot identify the person, but they are riding a horse.
I can't identify individual people, but a man is riding a bicycle.
I can't identify the people but two of them are riding a horse.
One person holds an umbrella. I am not able to identify the person.
The dog is not comfortable, as a boy is hugging it.
A m\u00e4dchen, that is a young girl, is flying a kite.
""".splitlines()
REFUSED = {
    "is a refusal": """\
I'm sorry, but I can't help with that.
I cannot help with that image
I can\u2019t assist with identifying the people in this photo.
Sorry, I am unable to view images of people.
I am so sorry, the person cannot be described.
There are two people. I'm sorry, but I cannot say more about them.
As an AI language model, I do not look at people.
I am not able to analyze the people in this image.
Unfortunately, I won't be able to describe the person in the picture.
I cannot identify the people in this image, such as the man with the horse.
I'm sorry, but I can't identify people in images.
I can't identify people in images.
I can't identify people in this image, but I can describe what the person is wearing.
I'm sorry, I can't identify the person who is riding the horse.
I can't identify people. Shall I say who is riding the horse?
I can't identify the person who is riding the horse.
I am not able to identify the person holding the umbrella in this image.
I cannot identify people sitting on the bench.
I don't have access to the image, so the man may hold anything.
I do not have the ability to see bicycles.
I do not see any image of a person here.
I could not open the image of the people.
I must decline to describe the woman with the dog.
I'm not comfortable describing the children in this photo.
Describing this child would be against the guidelines.
It violates content policies to describe the woman on the bed.
Please provide the image of the person.
Please upload a clear photo so that the people can be counted.
No image was provided, so nobody rides a bicycle.
The image could not be loaded. There may be a person.
Unable to process the image of a man on a horse.
I will not comply with a request about a person.
My apologies, I can't do this for people.
I am only a language model: no person, no dog.
There is no image attached to your message about people.
""".splitlines(),
    "fewer than": [
        *("Nice.", "People.", "A person", "...", "- - - -", "Two people?"),
        *("Are there people here? Four.", "\u4eba"),
    ],
    "names no": """\
The weather is nice and the sky is blue today.
This is a beautiful landscape with mountains and a lake.
Sure, here is the requested output in the expected format.
Lorem ipsum dolor amet consectetur adipiscing elit.
reasoning process here
The answer depends on the question.
Der Mond ist aufgegangen.
""".splitlines() + [hicodet.THINKING_PROCESS],
    "holds <": [f"{THINK}<|im_end|>", f"<|image_pad|>{THINK}", f"<think>{THINK}"],
}


def test_the_tables_are_large_and_balanced():
    refused = sum(map(len, REFUSED.values()))
    assert len(ACCEPTED) >= 30 and refused >= 30 and 0.8 < len(ACCEPTED) / refused < 1.25


@pytest.mark.parametrize("think", ACCEPTED)
def test_accepted(think):
    text = f"Sure: <think>\n{think} </think>"
    assert accept_trace(reply(text)) == (think, "")


@pytest.mark.parametrize("think, said", [(t, said) for said in REFUSED for t in REFUSED[said]])
def test_refused(think, said):
    trace, reason = accept_trace(reply(f"<think>\n{think}</think>"))
    assert trace is None and said in reason


@pytest.mark.parametrize("text, said", [
    (None, "no text within"), ("", "no text within"), (THINK, "no text within"),
    ("I cannot help with that.", "no text within"), ("<think> </think>", "no text within"),
    (f"<think>{THINK}", "no text within"), (f"{THINK}</think>", "no text within"),
    (f"<think>{THINK}</think><answer>[]</answer>", "<answer>"),
    (f"<think>{THINK}<answer></think>", "<answer>"),
])
def test_replies_without_a_trace_are_refused(text, said):
    trace, reason = accept_trace(reply(text))
    assert trace is None and said in reason


@pytest.mark.parametrize("before", [
    "It goes between <think> tags. Hmm, the man eats ... or is it a plate? Wait...</think>\n\n",
    "It goes between <think> and </think>. A man eats, I think.</think>\n\n",
    "<think>The man eats: from a plate?</think>\n",
    "<think>\nIt goes between <think> and </think>. A man eats.\n</think>",
])
@pytest.mark.parametrize("behind", ["", "\nDone.", "</think>", "<think> </think>", "<think>"])
def test_a_reasoning_teachers_own_thoughts_are_no_trace(before, behind):
    text = f"{before}<think>{THINK}</think>{behind}"
    assert accept_trace(reply(text)) == (THINK, "")


@pytest.mark.parametrize("finish_reason", ["length", "content_filter"])
def test_a_reply_cut_short_is_refused(finish_reason):
    trace, reason = accept_trace(reply(f"<think>{THINK}</think>", finish_reason))
    assert trace is None and finish_reason in reason
