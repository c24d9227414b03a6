"""What figures are taken of: questions, sentences, recordings and pictures that no training has seen, with what is right.

`benches/demo_models` puts them to the models through sarai itself.
"""

import json
import random
import wave

import numpy as np

from . import corpus, pictures, speech

PICTURES = 150
# The side of a picture file.
SIDE = 256


def write_wave(path, samples):
    with wave.open(str(path), "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(speech.RATE)
        file.writeframes((np.clip(samples, -1, 1) * 32767).astype("<i2").tobytes())


def questions(which):
    return [{"text": corpus.as_typed(which(intent, number), intent.language), "answer": intent.answer}
            for number, intent in enumerate(corpus.intents())]


def off_topic(name):
    return [{"text": text, "answer": corpus.DO_NOT_KNOW[language]} for language, text in corpus.off_topic_cases(name)]


def tones(name):
    """Sentences in each tone in turn: what has to be kept, and the tone's mark."""
    cases = []
    lines = [(language, line) for (language,), of in corpus.sections(name).items() for line in of]
    for number, (language, line) in enumerate(lines):
        parts = line.split("*")
        text, tone = "".join(parts), corpus.TONES[number % len(corpus.TONES)]
        before, after = corpus.MARKS.get((tone, language), ("", ""))
        cases.append({"text": text, "tone": tone, "kept": parts[1::2], "begins": before, "ends": after,
                      "said": corpus.in_tone(text, tone, language)})
    return cases


def recordings(folder, texts, voices, name):
    cases = []
    said = speech.held_out([(text, language) for text, language, _ in texts], voices, f"{folder.name} {name}")
    for number, (text, voice, samples) in enumerate(said):
        file = f"{name}-{number:03}.wav"
        write_wave(folder / file, samples)
        tone = corpus.TONES[number % len(corpus.TONES)]
        _, language, answer = texts[number]
        cases.append({"file": file, "text": text, "voice": voice, "answer": answer, "tone": tone,
                      "said": corpus.in_tone(answer, tone, language)})
    return cases


def drawn(folder, chance):
    cases = []
    for number in range(PICTURES):
        picture, language = corpus.any_picture(chance), corpus.LANGUAGES[number % 3 == 2]
        file = f"picture-{number:03}.png"
        pictures.draw(picture, chance, SIDE).save(folder / file)
        cases.append({"file": file, "asked": corpus.TO_DESCRIBE[language][0], "text": corpus.caption(picture, language)})
    return cases


# What the demo plays: who says what, and a picture.
PLAYED = (("question.wav", "what is the memory budget", "en-us+f5"), ("pregunta.wav", "qué es un token", "es+m4"))
PICTURE = (0, 0, 2, 1)


def write_demo(folder):
    """The recordings and the picture of the demo, by voices that no training has heard."""
    for file, text, voice in PLAYED:
        write_wave(folder / file, speech.utter(text, voice, random.Random(f"demo {file}"))[0])
    pictures.draw(PICTURE, random.Random("demo picture"), SIDE).save(folder / "picture.png")


def write(folder):
    """Two sets: `development`, for choosing between trainings, and `test`, for the figures alone."""
    chance = random.Random("evaluation")
    sets = (("development", lambda i: i.development, "dev", speech.DEVELOPMENT), ("test", lambda i: i.test, "test", speech.HELD_OUT))
    for name, paraphrase, suffix, voices in sets:
        to = folder / name
        to.mkdir(parents=True, exist_ok=True)
        offset = 0 if name == "test" else 1
        said = [(i.spoken[(number + offset) % corpus.SPOKEN], i.language, i.answer) for number, i in enumerate(corpus.intents())]
        unseen = [(paraphrase(i), i.language, i.answer) for i in corpus.intents()]
        cases = {
            "trained": questions(lambda i, number: i.questions[(number + offset) % len(i.questions)]),
            "paraphrases": questions(lambda i, _: paraphrase(i)),
            "off_topic": off_topic(f"off_topic_{suffix}.txt"),
            "speech": recordings(to, said, voices, "trained"),
            "unseen_speech": recordings(to, unseen, voices, "unseen"),
            "pictures": drawn(to, chance),
        }
        if name == "test":
            cases["tones"] = tones("tone_test.txt")
            cases["router"] = [{"text": text, "label": label} for text, label in corpus.router_test()]
        part = to / "cases.part"
        part.write_text(json.dumps(cases, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")
        part.replace(to / "cases.json")
