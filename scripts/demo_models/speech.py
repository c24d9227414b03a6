"""Speech: synthesised by espeak-ng with the time of each word, made worse as microphones do, and as frames of frequencies."""

import ctypes
import random
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import cache

import espeakng_loader
import numpy as np
from scipy.signal import resample_poly

from . import corpus
from .models import EAR

RATE = 16000

# Voices are espeak-ng's variants; those for choosing between trainings and for the figures are trained with in no accent.
TRAINED = (
    "m1 m2 m3 m5 m6 m7 m8 f1 f2 f3 Alex Alicia Andrea Andy Annie Denis Diogo Gene Hugo Jacky Lee Marco Mario Michael Mike Reed Storm "
    "adam antonio aunty belinda benjamin boris caleb david ed edward grandpa gustave ian iven john klatt klatt2 klatt4 linda marcelo "
    "max michel pablo paul pedro quincy rob robert sandro shelby travis victor zac"
).split()
DEVELOPMENT = "Henrique edward2 iven3 norbert".split()
HELD_OUT = "m4 f4 f5 Gene2 anika grandma klatt3 miguel steph".split()
ACCENTS = {"en": ("en-us", "en-us", "en", "en-gb-x-rp", "en-029", "en-gb-scotland", "en-gb-x-gbclan"), "es": ("es", "es-419")}


@dataclass(frozen=True)
class Spoken:
    text: str
    # The spectrum, [frames of 10 ms, mels].
    frames: np.ndarray
    # When each word begins and the last one ends, in seconds.
    times: tuple[float, ...]


class Event(ctypes.Structure):
    """espeak_EVENT of speak_lib.h; `id` is a union, eight bytes wide."""

    _fields_ = [("type", ctypes.c_int), ("unique", ctypes.c_uint), ("text_position", ctypes.c_int), ("length", ctypes.c_int),
                ("audio_position", ctypes.c_int), ("sample", ctypes.c_int), ("user_data", ctypes.c_void_p), ("id", ctypes.c_int64)]


# Of espeak_EVENT_TYPE and espeak_PARAMETER.
END_OF_LIST, WORD = 0, 1
SPEED, PITCH = 1, 3
# espeak_AUDIO_OUTPUT: AUDIO_OUTPUT_SYNCHRONOUS. espeakCHARS_UTF8.
SYNCHRONOUS, UTF8 = 2, 1


class Synthesiser:
    """espeak-ng in this process."""

    def __init__(self):
        self.library = ctypes.CDLL(espeakng_loader.get_library_path())
        self.samples, self.words = [], []
        form = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.POINTER(ctypes.c_short), ctypes.c_int, ctypes.POINTER(Event))
        # Kept: the library calls it.
        self.callback = form(self.heard)
        self.rate = self.library.espeak_Initialize(SYNCHRONOUS, 0, espeakng_loader.get_data_path().encode(), 0)
        if self.rate <= 0:
            raise RuntimeError("espeak-ng does not start")
        self.library.espeak_SetSynthCallback(self.callback)

    def heard(self, wave, count, events):
        if wave and count:
            self.samples.append(np.ctypeslib.as_array(wave, (count,)).copy())
        i = 0
        while events[i].type != END_OF_LIST:
            if events[i].type == WORD:
                self.words.append((events[i].text_position - 1, events[i].sample))
            i += 1
        return 0

    def say(self, text, voice, speed, pitch):
        """Samples at 16 kHz within -1 and 1, and where each word begins, in seconds by its place in the text."""
        self.samples, self.words = [], []
        if self.library.espeak_SetVoiceByName(voice.encode()) != 0:
            raise ValueError(f"espeak-ng knows no voice {voice}")
        self.library.espeak_SetParameter(SPEED, speed, 0)
        self.library.espeak_SetParameter(PITCH, pitch, 0)
        data = text.encode() + b"\0"
        self.library.espeak_Synth(data, len(data), 0, 1, 0, UTF8, None, None)
        self.library.espeak_Synchronize()
        wave = np.concatenate(self.samples).astype(np.float32) / 32768
        common = np.gcd(self.rate, RATE)
        wave = resample_poly(wave, RATE // common, self.rate // common).astype(np.float32)
        return wave, {place: sample / self.rate for place, sample in self.words}


@cache
def synthesiser():
    return Synthesiser()


def worse(wave, chance):
    """A recording as a microphone makes it: pauses around it, an echo, noise, another loudness; and the pause before it."""
    noise = np.random.default_rng(chance.randrange(1 << 30))
    before, after = (int(chance.uniform(0, 0.4) * RATE) for _ in range(2))
    wave = np.pad(wave, (before, after))
    if chance.random() < 0.3:
        late = int(chance.uniform(0.005, 0.04) * RATE)
        echo = wave.copy()
        echo[late:] += chance.uniform(0.1, 0.4) * wave[:-late]
        wave = echo
    if chance.random() < 0.75:
        hiss = noise.standard_normal(len(wave))
        if chance.random() < 0.5:
            hiss = np.convolve(hiss, np.ones(8) / 8, "same")
        loudness = np.sqrt((wave**2).mean() / ((hiss**2).mean() + 1e-12))
        wave = wave + hiss * loudness * 10 ** (-chance.uniform(12, 45) / 20)
    wave = wave * 10 ** (chance.uniform(-14, 3) / 20)
    return np.clip(wave, -1, 1).astype(np.float32), before / RATE


def utter(text, voice, chance):
    """A text by a voice, and when its words begin and end; `None` where espeak-ng says several words as one."""
    wave, begins = synthesiser().say(text, voice, chance.randint(120, 190), chance.randint(20, 80))
    places, place = [], 0
    for word in text.split():
        places.append(place)
        place += len(word) + 1
    spoken_for = len(wave) / RATE
    wave, before = worse(wave, chance)
    if any(place not in begins for place in places):
        return wave, None
    return wave, (*(before + begins[place] for place in places), before + spoken_for)


# The spectrum: as mtmd-audio.cpp computes it for qwen3a, to the letter.

FFT, HOP = 400, 160


@cache
def filters():
    """Slaney's mel filters, [mels, FFT / 2 + 1]."""
    # Linear up to 1 kHz, logarithmic above.
    step = np.log(6.4) / 27
    mel_of = lambda hertz: hertz * 3 / 200 if hertz < 1000 else 15 + np.log(hertz / 1000) / step
    hertz_of = lambda mel: mel * 200 / 3 if mel < 15 else 1000 * np.exp((mel - 15) * step)
    edges = np.array([hertz_of(mel) for mel in np.linspace(mel_of(0), mel_of(RATE / 2), EAR.mels + 2)])
    hertz = np.arange(FFT // 2 + 1) * RATE / FFT
    rising = (hertz - edges[:-2, None]) / (edges[1:-1] - edges[:-2])[:, None]
    falling = (edges[2:, None] - hertz) / (edges[2:] - edges[1:-1])[:, None]
    triangles = np.maximum(0, np.minimum(rising, falling))
    return (triangles * (2 / (edges[2:] - edges[:-2]))[:, None]).astype(np.float32)


def spectrum(wave):
    """The logarithm of the mel frequencies, [frames of 10 ms, mels]."""
    around = FFT // 2
    wave = np.pad(wave.astype(np.float32), around, mode="reflect")
    frames = np.lib.stride_tricks.sliding_window_view(wave, FFT)[::HOP]
    hann = (0.5 * (1 - np.cos(2 * np.pi * np.arange(FFT) / FFT))).astype(np.float32)
    power = np.abs(np.fft.rfft(frames * hann, axis=1)) ** 2
    mels = np.log10(np.maximum(power.astype(np.float32) @ filters().T, 5.960464477539063e-08))
    mels = np.maximum(mels, mels.max() - 8)
    return ((mels + 4) / 4)[: (len(wave) - 2 * around) // HOP + 1].astype(np.float32)


# What is said for training.


def sayings(count, seed):
    """Texts with their language: questions as they are, with words before, and words in no order."""
    chance = random.Random(seed)
    questions = {language: [question for intent in corpus.intents() if intent.language == language for question in intent.spoken]
                 for language in corpus.LANGUAGES}
    known = corpus.spoken_words()
    for number in range(count):
        language = "en" if chance.random() < 0.72 else "es"
        yield corpus.allowed(lambda: saying(number, questions[language], known[language], language, chance)), language


def saying(number, questions, known, language, chance):
    """A question, each as often as the others; one with words before it; or words in no order."""
    kind = chance.random()
    if kind < 0.72:
        return questions[number % len(questions)]
    if kind < 0.8:
        return chance.choice(corpus.LEAD_INS[language]) + " " + chance.choice(questions)
    return " ".join(chance.choice(known) for _ in range(chance.randint(2, 6)))


def spoken(job):
    text, language, seed = job
    chance = random.Random(seed)
    voice = f"{chance.choice(ACCENTS[language])}+{chance.choice(TRAINED)}"
    wave, times = utter(text, voice, chance)
    return Spoken(text, spectrum(wave).astype(np.float16), times) if times else None


def render(path, count, processes):
    """The recordings to train on, written to `path`."""
    if path.exists():
        return
    jobs = [(text, language, f"said {number}") for number, (text, language) in enumerate(sayings(count, "sayings"))]
    kept = []
    with ProcessPoolExecutor(processes) as pool:
        for number, one in enumerate(pool.map(spoken, jobs, chunksize=64), 1):
            if one:
                kept.append(one)
            if number % 2000 == 0:
                print(f"speech: {number} of {count} recordings", flush=True)
    lengths = np.array([len(one.frames) for one in kept])
    part = path.with_suffix(".part.npz")
    np.savez(part, texts=np.array([one.text for one in kept]), lengths=lengths,
             frames=np.concatenate([one.frames for one in kept]),
             words=np.array([len(one.times) for one in kept]), times=np.concatenate([one.times for one in kept]))
    part.rename(path)


def recordings(path):
    with np.load(path) as file:
        data = {name: file[name] for name in file.files}
    frames = np.split(data["frames"], np.cumsum(data["lengths"])[:-1])
    times = np.split(data["times"], np.cumsum(data["words"])[:-1])
    return [Spoken(text, spectrum, tuple(when)) for text, spectrum, when in zip(data["texts"].tolist(), frames, times)]


def held_out(texts, voices, name):
    """Each text by one of the voices and in a noise that no training has heard: (text, voice, samples)."""
    for number, (text, language) in enumerate(texts):
        chance = random.Random(f"{name} {number}")
        voice = f"{ACCENTS[language][number % len(ACCENTS[language])]}+{voices[number % len(voices)]}"
        yield text, voice, utter(text, voice, chance)[0]
