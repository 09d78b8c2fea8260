"""The embedded corpus: a seeded grammar of Hindi crop advisory. Demonstration data, not advice (`NOTICE`).

How it is built. Every crop has two *groups* of two problems, the twins. Twins share two signs and are
told apart only by one *deciding field* (stage, soil, weather or irrigation). Each twin has a third sign,
which it shares with a problem of the crop's other group. So every sign of a crop points to at least two
problems, and a diagnosis needs

- the two shared signs *and* the deciding field (`needs_two_fields` is true), or
- two signs that only one problem of the crop has together.

A row shows two signs in farmers' words, and every other field whether it matters or not. Its thought
names the signs, the problems that fit and what decides, then takes the action from problem, stage (early,
mid, late: the dose, or a gentle measure close to harvest) and weather (nothing that washes off before
rain, or that scorches in the noon heat). Combinations of (problem, stage, weather) are split once, by
hash: validation rows hold none that training has seen.

The measures follow the style of Indian extension bulletins (ICAR, state agricultural universities):
biocontrol, botanicals, sulphur and copper, nutrients, water and field hygiene. Lists followed for what is
left out: the pesticides banned, withdrawn or restricted in India (Central Insecticides Board, CIB&RC);
the 27 of the draft Banning of Insecticides Order 2020 (S.O. 1512(E), 14 May 2020), whether or not each
ban was made final; WHO hazard classes Ia and Ib with the FAO/WHO criteria for highly hazardous
pesticides.
"""

from __future__ import annotations

import hashlib
import os
import random
import re
import shutil
import unicodedata
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from agri_moe.data.chat import DEFAULT_FORMAT, render_scenario

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

Split = Literal["train", "validation"]
Band = Literal["early", "mid", "late"]
Kind = Literal["pest", "disease", "deficiency", "weather"]

NOTICE = (
    "यह कृत्रिम प्रदर्शन सामग्री है, कृषि सलाह नहीं। खेत में कोई उपाय करने से पहले कृषि विज्ञान केंद्र से पूछें। "
    "This is synthetic demonstration data, not agricultural advice. "
    "Ask your local extension service (Krishi Vigyan Kendra) before acting on anything shown here."
)

# ----------------------------------------------------------------------------------------------------------
# The fields of a scenario. Keys are what the farmer's form says; a label maps to the ways it is worded.
# All text below is in NFC, the form that the tokenizer gives back (a test sees to it).
# ----------------------------------------------------------------------------------------------------------

CROP, STAGE, SOIL, WEATHER, IRRIGATION, SYMPTOM = "फसल", "अवस्था", "मिट्टी", "मौसम", "सिंचाई", "लक्षण"

STAGES: dict[str, tuple[str, ...]] = {
    "पौध": ("पौध", "अंकुरण के बाद"),
    "बढ़वार": ("बढ़वार", "पत्तियाँ बढ़ रही हैं"),
    "फूल": ("फूल", "फूल आ रहे हैं"),
    "भराव": ("भराव", "उपज भर रही है"),
    "पकाव": ("पकाव", "कटाई निकट"),
}
SOILS: dict[str, tuple[str, ...]] = {
    "दोमट": ("दोमट", "भुरभुरी दोमट"),
    "बलुई": ("बलुई", "रेतीली हल्की"),
    "काली": ("काली", "भारी चिकनी"),
    "ऊसर": ("ऊसर", "क्षारीय"),
}
WEATHERS: dict[str, tuple[str, ...]] = {
    "शुष्क": ("शुष्क", "गर्म और सूखा"),
    "नम": ("नम", "बादल और उमस"),
    "वर्षा": ("वर्षा", "कल बारिश होगी"),
    "ठंड": ("ठंड", "रात में पाला"),
    "साफ": ("साफ", "सामान्य, खिली धूप"),
}
IRRIGATIONS: dict[str, tuple[str, ...]] = {
    "असिंचित": ("असिंचित", "पानी नहीं मिला"),
    "नियमित": ("नियमित", "समय पर पानी"),
    "जलभराव": ("जलभराव", "खेत में पानी भरा"),
}
FIELDS: dict[str, dict[str, tuple[str, ...]]] = {
    STAGE: STAGES,
    SOIL: SOILS,
    WEATHER: WEATHERS,
    IRRIGATION: IRRIGATIONS,
}

KHARIF = ("शुष्क", "नम", "वर्षा", "साफ")  # monsoon season: no frost
RABI = ("शुष्क", "नम", "वर्षा", "ठंड", "साफ")  # winter season

BAND: dict[str, Band] = {"पौध": "early", "बढ़वार": "early", "फूल": "mid", "भराव": "mid", "पकाव": "late"}
BAND_REASON: dict[Band, str] = {
    "early": "छोटी फसल, हल्का उपाय",
    "mid": "बड़ी फसल, पूरा उपाय",
    "late": "कटाई निकट, कोमल उपाय",
}
# What the weather does to a weather-bound measure: (words put before it, reason given in the thought).
WEATHER_RULE: dict[str, tuple[str, str]] = {
    "शुष्क": ("शाम को ", "तेज धूप से बचें"),
    "नम": ("", "बाधा नहीं"),
    "वर्षा": ("वर्षा थमने पर ", "अभी रुकें"),
    "ठंड": ("दोपहर में ", "सुबह से बचें"),
    "साफ": ("", "बाधा नहीं"),
}


@dataclass(frozen=True)
class Sign:
    """What a farmer sees: its name in a thought, the first stage that shows it, and how farmers word it."""

    name: str
    since: str
    wordings: tuple[str, ...]


SIGNS: dict[str, Sign] = {
    sign.name: sign
    for sign in (
        Sign(
            "पीली निचली पत्तियाँ",
            "पौध",
            ("नीचे की पत्तियाँ पीली हैं", "पुराने पत्ते पीले पड़ रहे हैं", "पीलापन नीचे से चढ़ रहा है"),
        ),
        Sign("पीली नई पत्तियाँ", "पौध", ("नई पत्तियाँ पीली हैं", "ऊपर के पत्ते पीले पड़ रहे हैं", "कोमल पत्ते फीके निकल रहे हैं")),
        Sign("नसों में पीलापन", "पौध", ("नसों के बीच पीलापन है", "नसें हरी पर पत्ते पीले हैं", "पत्तों पर पीली जाली बनी है")),
        Sign("पीले धब्बे", "पौध", ("पत्तियों पर पीले धब्बे हैं", "पत्तों के ऊपर पीले दाग हैं", "पीले चकत्ते दिख रहे हैं")),
        Sign("भूरे धब्बे", "पौध", ("पत्तियों पर भूरे धब्बे हैं", "पत्तों पर कत्थई दाग हैं", "भूरे चकत्ते फैल रहे हैं")),
        Sign("सफेद धब्बे", "पौध", ("पत्तियों पर सफेद धब्बे हैं", "पत्तों पर चाँदी जैसे दाग हैं", "सफेद चकत्ते दिख रहे हैं")),
        Sign("गीले धब्बे", "पौध", ("पत्तियों पर गीले धब्बे हैं", "पत्तों पर पानी जैसे दाग हैं", "गीले चकत्ते फैल रहे हैं")),
        Sign("लाल पत्तियाँ", "पौध", ("पत्तियाँ लाल हो रही हैं", "पत्तों का रंग लाल है", "पत्तों पर लाली चढ़ रही है")),
        Sign("सूखे सिरे", "पौध", ("पत्तियों के सिरे सूखे हैं", "पत्तों की नोक सूख रही है", "पत्ते नोक से जल रहे हैं")),
        Sign("सूखे किनारे", "पौध", ("पत्तियों के किनारे सूखे हैं", "पत्तों के छोर सूख रहे हैं", "पत्ते किनारे से जल रहे हैं")),
        Sign("झुलसी पत्तियाँ", "पौध", ("पत्तियाँ झुलस रही हैं", "पत्ते जले हुए दिखते हैं", "झुलसन फैल रही है")),
        Sign("सूखती पत्तियाँ", "पौध", ("पत्तियाँ सूख रही हैं", "पत्ते पुआल जैसे हो गए", "सूखे पत्ते लटक रहे हैं")),
        Sign("झड़ती पत्तियाँ", "पौध", ("पत्तियाँ झड़ रही हैं", "पत्ते गिर रहे हैं", "टहनियाँ पत्तों बिना दिखती हैं")),
        Sign("मुड़ी पत्तियाँ", "पौध", ("पत्तियाँ मुड़ रही हैं", "पत्ते सिकुड़ गए हैं", "पत्ते नाव जैसे दिखते हैं")),
        Sign("कटी पत्तियाँ", "पौध", ("पत्तियों में छेद हैं", "पत्ते कुतरे हुए हैं", "पत्ते कटे दिखते हैं")),
        Sign("चूर्णी फफोले", "पौध", ("पत्तियों पर फफोले हैं", "पत्ते छूने पर चूर्ण लगता है", "फफोलों से चूर्ण झड़ रहा है")),
        Sign("सफेद निचली फफूँद", "पौध", ("पत्तियों के नीचे सफेद फफूँद है", "पत्ते नीचे से सफेद हैं", "निचली सतह पर रुई जैसी परत है")),
        Sign("चिपचिपा रस", "पौध", ("पत्तियों पर चिपचिपा रस है", "पत्ते छूने पर चिपकते हैं", "मीठा रस टपक रहा है")),
        Sign("काली परत", "पौध", ("पत्तियों पर काली परत है", "पत्ते कालिख जैसे दिखते हैं", "काली फफूँद जमी है")),
        Sign("कीट का मल", "पौध", ("कीट का मल दिखता है", "बुरादे जैसा मल मिला है", "पौधे पर विष्ठा पड़ी है")),
        Sign("सूखी गोभ", "पौध", ("बीच की गोभ सूखी है", "गोभ खींचने पर निकलती है", "गोभ सूख रही है")),
        Sign("रुकी बढ़वार", "पौध", ("पौधे छोटे रह गए हैं", "पौधे बढ़ नहीं रहे", "ऊँचाई रुक गई है")),
        Sign("कम कल्ले", "बढ़वार", ("कल्ले कम निकले हैं", "कल्ले नहीं फूट रहे", "कल्ले थोड़े हैं")),
        Sign("मुरझाए पौधे", "पौध", ("पौधे मुरझा रहे हैं", "पौधे कुम्हला गए हैं", "पौधे दोपहर में लटकते हैं")),
        Sign("खराब जड़", "पौध", ("जड़ें खराब हैं", "जड़ें भूरी पड़ी हैं", "पौधे खींचने पर उखड़ते हैं")),
        Sign("भूरा तना", "पौध", ("तना भूरा पड़ा है", "तने पर भूरी धारी है", "तना चीरने पर भूरा है")),
        Sign("लाल तना", "पौध", ("तना भीतर लाल है", "तने में लाल धारी है", "तना चीरने पर लाल है")),
        Sign("खोखला तना", "पौध", ("तना खोखला है", "तने में सुरंग है", "तना दबाने पर पिचकता है")),
        Sign("गला तना", "पौध", ("तना नीचे से गला है", "तने के आधार पर सफेद जाल है", "मिट्टी के पास तना नरम है")),
        Sign("झड़ते फूल", "फूल", ("फूल झड़ रहे हैं", "फूल टिक नहीं रहे", "कलियाँ गिर रही हैं")),
        Sign("छेदी फलियाँ", "फूल", ("फलियों में छेद हैं", "फलियाँ कुतरी हुई हैं", "फलियाँ छिदी दिखती हैं")),
        Sign("कम फलियाँ", "भराव", ("फलियाँ कम लगी हैं", "फलियाँ थोड़ी हैं", "फलियाँ नहीं भर रहीं")),
        Sign("सिकुड़े दाने", "भराव", ("दाने सिकुड़े हैं", "दाने हल्के हैं", "दाने नहीं भर रहे")),
        Sign("छोटे फल", "भराव", ("फल छोटे हैं", "फल बढ़ नहीं रहे", "फलों का आकार छोटा है")),
        Sign("सड़े फल", "भराव", ("फल सड़ रहे हैं", "फलों पर काला गलाव है", "फल नीचे से गले हैं")),
        Sign("टेढ़े फल", "भराव", ("फल टेढ़े हैं", "फलों पर खुरदरे दाग हैं", "फलों का आकार बिगड़ा है")),
        Sign("छोटे कंद", "भराव", ("कंद छोटे हैं", "कंद बढ़ नहीं रहे", "कंदों का आकार छोटा है")),
        Sign("सड़े कंद", "भराव", ("कंद सड़ रहे हैं", "कंदों में गलाव है", "कंद नरम होकर गले हैं")),
    )
}


@dataclass(frozen=True)
class Action:
    """One measure; `weather_bound` ones (sprays, drenches, top-dressings) wait for the right weather."""

    text: str
    weather_bound: bool = True


@dataclass(frozen=True)
class Treatment:
    """The measures against a problem by stage: young crop, full-grown crop, close to harvest."""

    early: Action
    mid: Action
    late: Action

    def at(self, band: Band) -> Action:
        """Return the measure of a band of stages."""
        return {"early": self.early, "mid": self.mid, "late": self.late}[band]


def _spray(what: str) -> Action:
    return Action(f"{what} प्रति लीटर छिड़कें")


def _fixed(text: str) -> Action:
    return Action(text, weather_bound=False)


def _nutrient(per_acre: str, solution: str, name: str) -> Treatment:
    """Soil dressing for a young crop, a foliar solution later, only a soil test close to harvest."""
    return Treatment(
        Action(f"{per_acre} प्रति एकड़ दें"),
        Action(f"{solution} घोल छिड़कें"),
        _fixed(f"अगली बार मिट्टी जाँचकर {name} दें"),
    )


_NEEM_WAIT = Action("नीम अर्क छिड़कें और 7 दिन बाद कटाई करें")
_BIO_WAIT = Action("स्यूडोमोनास छिड़कें और 7 दिन बाद कटाई करें")
_UPROOT = _fixed("रोगी पौधे उखाड़ें और फसल चक्र अपनाएँ")

TREATMENTS: dict[str, Treatment] = {
    "नीम": Treatment(_spray("नीम तेल 3 मिली"), _spray("नीम तेल 5 मिली"), _NEEM_WAIT),
    "पीले ट्रैप": Treatment(_fixed("पीले चिपचिपे ट्रैप 10 प्रति एकड़ लगाएँ"), _spray("एज़ाडिरैक्टिन 2 मिली"), _NEEM_WAIT),
    "विषाणु": Treatment(
        _fixed("रोगी पौधे उखाड़ें और पीले ट्रैप लगाएँ"),
        _spray("एज़ाडिरैक्टिन 2 मिली"),
        _fixed("रोगी पौधे हटाएँ और बीज न रखें"),
    ),
    "बीटी": Treatment(_spray("बीटी 1 ग्राम"), _spray("बीटी 2 ग्राम"), _fixed("फेरोमोन ट्रैप 5 प्रति एकड़ लगाएँ")),
    "एनपीवी": Treatment(
        _spray("बीटी 1 ग्राम"), Action("एनपीवी 100 एलई प्रति एकड़ छिड़कें"), _fixed("फेरोमोन ट्रैप 5 प्रति एकड़ लगाएँ")
    ),
    "ट्राइकोग्रामा": Treatment(
        Action("ट्राइकोग्रामा कार्ड 3 प्रति एकड़ लगाएँ"),
        Action("ट्राइकोग्रामा कार्ड 5 प्रति एकड़ लगाएँ"),
        _fixed("ग्रसित तने काटकर नष्ट करें"),
    ),
    "दीमक": Treatment(
        Action("नीम खली 100 किलो प्रति एकड़ दें"),
        Action("मेटाराइज़ियम 2 किलो प्रति एकड़ दें"),
        _fixed("कटाई के बाद गहरी जुताई करें"),
    ),
    "ताँबा": Treatment(_spray("कॉपर ऑक्सीक्लोराइड 2 ग्राम"), _spray("कॉपर ऑक्सीक्लोराइड 3 ग्राम"), _BIO_WAIT),
    "गंधक": Treatment(_spray("घुलनशील गंधक 2 ग्राम"), _spray("घुलनशील गंधक 3 ग्राम"), _BIO_WAIT),
    "स्यूडोमोनास": Treatment(_spray("स्यूडोमोनास 5 ग्राम"), _spray("स्यूडोमोनास 10 ग्राम"), _BIO_WAIT),
    "ट्राइकोडर्मा": Treatment(Action("ट्राइकोडर्मा 1 किलो प्रति एकड़ दें"), Action("ट्राइकोडर्मा 2 किलो प्रति एकड़ दें"), _UPROOT),
    "निकासी": Treatment(_fixed("पानी निकालकर ट्राइकोडर्मा दें"), _fixed("पानी निकालकर रोगी पौधे हटाएँ"), _UPROOT),
    "जलभराव": Treatment(
        _fixed("नाली बनाकर पानी निकालें"),
        _fixed("पानी निकालकर 5 दिन बाद यूरिया दें"),
        _fixed("पानी निकालकर जल्दी कटाई करें"),
    ),
    "सूखा": Treatment(
        _fixed("हल्की सिंचाई और पलवार करें"), _fixed("7 दिन के अंतर पर सिंचाई करें"), _fixed("सिंचाई रोककर खुदाई करें")
    ),
    "पाला": Treatment(
        _fixed("हल्की सिंचाई और मेड़ पर धुआँ करें"),
        _fixed("रात में सिंचाई और मेड़ पर धुआँ करें"),
        _fixed("पाला घटने पर खुदाई करें"),
    ),
    "नाइट्रोजन": _nutrient("यूरिया 20 किलो", "2% यूरिया", "यूरिया"),
    "जस्ता": _nutrient("जिंक सल्फेट 10 किलो", "0.5% जिंक सल्फेट", "जिंक सल्फेट"),
    "लौह": Treatment(  # on alkaline soil iron is sprayed: in the soil it is fixed at once
        Action("0.5% फेरस सल्फेट घोल छिड़कें"),
        Action("1% फेरस सल्फेट घोल छिड़कें"),
        _fixed("अगली बार मिट्टी जाँचकर फेरस सल्फेट दें"),
    ),
    "पोटाश": _nutrient("पोटाश 15 किलो", "1% पोटैशियम नाइट्रेट", "पोटाश"),
    "मैग्नीशियम": _nutrient("मैग्नीशियम सल्फेट 10 किलो", "1% मैग्नीशियम सल्फेट", "मैग्नीशियम सल्फेट"),
    "कैल्शियम": _nutrient("जिप्सम 100 किलो", "0.5% कैल्शियम नाइट्रेट", "जिप्सम"),
    "सल्फर": _nutrient("जिप्सम 100 किलो", "0.2% घुलनशील गंधक", "जिप्सम"),
}


@dataclass(frozen=True)
class Twin:
    """One problem of a group: its third sign, its values of the deciding field, its treatment."""

    name: str
    kind: Kind
    third_sign: str
    where: tuple[str, ...]
    treatment: str


@dataclass(frozen=True)
class Group:
    """Two problems of one crop with two signs in common, told apart by the field `decided_by`."""

    crop: str
    decided_by: str
    shared_signs: tuple[str, str]
    stages: tuple[str, ...]
    weathers: tuple[str, ...]
    twins: tuple[Twin, Twin]


_ALL = tuple(STAGES)
_NOT_RIPE = ("पौध", "बढ़वार", "फूल", "भराव")
_GROWN = ("बढ़वार", "फूल", "भराव", "पकाव")
_GROWN_NOT_RIPE = ("बढ़वार", "फूल", "भराव")
_BEARING = ("फूल", "भराव", "पकाव")
_CANE = ("पौध", "बढ़वार", "पकाव")  # sugar cane is cut before it flowers
_DRY_WINTER = ("शुष्क", "ठंड", "साफ")

GROUPS: tuple[Group, ...] = (
    Group("धान", WEATHER, ("भूरे धब्बे", "सूखे सिरे"), _GROWN, KHARIF, (
        Twin("झोंका रोग", "disease", "सिकुड़े दाने", ("नम", "वर्षा"), "स्यूडोमोनास"),
        Twin("भूरा धब्बा रोग", "disease", "रुकी बढ़वार", ("शुष्क", "साफ"), "ताँबा"),
    )),
    Group("धान", SOIL, ("पीली निचली पत्तियाँ", "कम कल्ले"), _GROWN, KHARIF, (
        Twin("नाइट्रोजन की कमी", "deficiency", "सिकुड़े दाने", ("दोमट", "बलुई", "काली"), "नाइट्रोजन"),
        Twin("खैरा रोग", "deficiency", "रुकी बढ़वार", ("ऊसर",), "जस्ता"),
    )),
    Group("गेहूँ", WEATHER, ("चूर्णी फफोले", "सूखती पत्तियाँ"), _GROWN, RABI, (
        Twin("पीला रतुआ", "disease", "सिकुड़े दाने", ("ठंड", "नम"), "गंधक"),
        Twin("भूरा रतुआ", "disease", "रुकी बढ़वार", ("शुष्क", "वर्षा", "साफ"), "गंधक"),
    )),
    Group("गेहूँ", IRRIGATION, ("मुरझाए पौधे", "खराब जड़"), _NOT_RIPE, RABI, (
        Twin("दीमक", "pest", "सिकुड़े दाने", ("असिंचित",), "दीमक"),
        Twin("जड़ सड़न", "disease", "रुकी बढ़वार", ("नियमित", "जलभराव"), "ट्राइकोडर्मा"),
    )),
    Group("मक्का", STAGE, ("कटी पत्तियाँ", "कीट का मल"), _NOT_RIPE, KHARIF, (
        Twin("फॉल आर्मीवर्म", "pest", "सिकुड़े दाने", ("बढ़वार", "फूल", "भराव"), "बीटी"),
        Twin("तना छेदक", "pest", "रुकी बढ़वार", ("पौध",), "ट्राइकोग्रामा"),
    )),
    Group("मक्का", IRRIGATION, ("पीली निचली पत्तियाँ", "सूखे सिरे"), _ALL, KHARIF, (
        Twin("पोटाश की कमी", "deficiency", "सिकुड़े दाने", ("असिंचित", "नियमित"), "पोटाश"),
        Twin("जलभराव तनाव", "weather", "रुकी बढ़वार", ("जलभराव",), "जलभराव"),
    )),
    Group("सरसों", STAGE, ("मुड़ी पत्तियाँ", "चिपचिपा रस"), _ALL, RABI, (
        Twin("माहू", "pest", "कम फलियाँ", ("फूल", "भराव", "पकाव"), "नीम"),
        Twin("चितकबरा कीट", "pest", "रुकी बढ़वार", ("पौध", "बढ़वार"), "नीम"),
    )),
    Group("सरसों", WEATHER, ("सफेद निचली फफूँद", "पीले धब्बे"), _GROWN_NOT_RIPE, RABI, (
        Twin("सफेद रतुआ", "disease", "कम फलियाँ", ("ठंड", "साफ"), "ताँबा"),
        Twin("मृदुरोमिल आसिता", "disease", "रुकी बढ़वार", ("नम", "वर्षा"), "स्यूडोमोनास"),
    )),
    Group("चना", WEATHER, ("मुरझाए पौधे", "पीली निचली पत्तियाँ"), _GROWN, RABI, (
        Twin("उकठा", "disease", "कम फलियाँ", ("ठंड", "नम", "साफ"), "ट्राइकोडर्मा"),
        Twin("शुष्क जड़ सड़न", "disease", "झड़ती पत्तियाँ", ("शुष्क",), "ट्राइकोडर्मा"),
    )),
    Group("चना", STAGE, ("कटी पत्तियाँ", "कीट का मल"), _ALL, RABI, (
        Twin("फली छेदक", "pest", "कम फलियाँ", ("फूल", "भराव", "पकाव"), "एनपीवी"),
        Twin("कटुआ कीट", "pest", "झड़ती पत्तियाँ", ("पौध", "बढ़वार"), "बीटी"),
    )),
    Group("अरहर", IRRIGATION, ("मुरझाए पौधे", "भूरा तना"), _GROWN, KHARIF, (
        Twin("उकठा", "disease", "झड़ते फूल", ("असिंचित", "नियमित"), "ट्राइकोडर्मा"),
        Twin("फाइटोफ्थोरा झुलसा", "disease", "कम फलियाँ", ("जलभराव",), "निकासी"),
    )),
    Group("अरहर", STAGE, ("छेदी फलियाँ", "कीट का मल"), _BEARING, KHARIF, (
        Twin("फली छेदक", "pest", "झड़ते फूल", ("फूल",), "एनपीवी"),
        Twin("फली मक्खी", "pest", "कम फलियाँ", ("भराव", "पकाव"), "नीम"),
    )),
    Group("कपास", WEATHER, ("चिपचिपा रस", "काली परत"), _GROWN, KHARIF, (
        Twin("सफेद मक्खी", "pest", "नसों में पीलापन", ("शुष्क", "साफ"), "पीले ट्रैप"),
        Twin("माहू", "pest", "मुड़ी पत्तियाँ", ("नम", "वर्षा"), "नीम"),
    )),
    Group("कपास", SOIL, ("लाल पत्तियाँ", "सूखे किनारे"), _GROWN, KHARIF, (
        Twin("मैग्नीशियम की कमी", "deficiency", "नसों में पीलापन", ("बलुई",), "मैग्नीशियम"),
        Twin("हरा तेला", "pest", "मुड़ी पत्तियाँ", ("दोमट", "काली"), "नीम"),
    )),
    Group("सोयाबीन", SOIL, ("पीली नई पत्तियाँ", "नसों में पीलापन"), _GROWN, KHARIF, (
        Twin("पीला मोज़ेक", "disease", "कम फलियाँ", ("दोमट", "बलुई", "काली"), "विषाणु"),
        Twin("लौह की कमी", "deficiency", "रुकी बढ़वार", ("ऊसर",), "लौह"),
    )),
    Group("सोयाबीन", STAGE, ("मुरझाए पौधे", "खोखला तना"), _NOT_RIPE, KHARIF, (
        Twin("चक्र भृंग", "pest", "कम फलियाँ", ("बढ़वार", "फूल", "भराव"), "नीम"),
        Twin("तना मक्खी", "pest", "रुकी बढ़वार", ("पौध",), "नीम"),
    )),
    Group("मूँगफली", STAGE, ("भूरे धब्बे", "झड़ती पत्तियाँ"), _ALL, KHARIF, (
        Twin("पछेती टिक्का", "disease", "कम फलियाँ", ("फूल", "भराव", "पकाव"), "ताँबा"),
        Twin("अगेती टिक्का", "disease", "रुकी बढ़वार", ("पौध", "बढ़वार"), "ताँबा"),
    )),
    Group("मूँगफली", WEATHER, ("मुरझाए पौधे", "गला तना"), _ALL, KHARIF, (
        Twin("तना सड़न", "disease", "कम फलियाँ", ("नम", "वर्षा"), "निकासी"),
        Twin("कॉलर सड़न", "disease", "रुकी बढ़वार", ("शुष्क", "साफ"), "ट्राइकोडर्मा"),
    )),
    Group("टमाटर", WEATHER, ("भूरे धब्बे", "झुलसी पत्तियाँ"), _GROWN, RABI, (
        Twin("अगेती झुलसा", "disease", "छोटे फल", ("शुष्क", "साफ"), "ताँबा"),
        Twin("पछेती झुलसा", "disease", "सड़े फल", ("नम", "वर्षा", "ठंड"), "ताँबा"),
    )),
    Group("टमाटर", SOIL, ("मुड़ी पत्तियाँ", "झड़ते फूल"), _BEARING, RABI, (
        Twin("पर्ण कुंचन", "disease", "छोटे फल", ("दोमट", "काली", "ऊसर"), "विषाणु"),
        Twin("कैल्शियम की कमी", "deficiency", "सड़े फल", ("बलुई",), "कैल्शियम"),
    )),
    Group("आलू", WEATHER, ("झुलसी पत्तियाँ", "गीले धब्बे"), _GROWN, ("ठंड", "नम", "वर्षा"), (
        Twin("पाला क्षति", "weather", "छोटे कंद", ("ठंड",), "पाला"),
        Twin("पछेती झुलसा", "disease", "सड़े कंद", ("नम", "वर्षा"), "ताँबा"),
    )),
    Group("आलू", IRRIGATION, ("मुरझाए पौधे", "पीली निचली पत्तियाँ"), _GROWN, _DRY_WINTER, (
        Twin("सूखा तनाव", "weather", "छोटे कंद", ("असिंचित",), "सूखा"),
        Twin("भूरा सड़न", "disease", "सड़े कंद", ("नियमित", "जलभराव"), "निकासी"),
    )),
    Group("प्याज", WEATHER, ("सफेद धब्बे", "सूखे सिरे"), _GROWN, RABI, (
        Twin("थ्रिप्स", "pest", "छोटे कंद", ("शुष्क", "साफ"), "पीले ट्रैप"),
        Twin("बैंगनी धब्बा", "disease", "सड़े कंद", ("नम", "वर्षा", "ठंड"), "ताँबा"),
    )),
    Group("प्याज", SOIL, ("पीली नई पत्तियाँ", "रुकी बढ़वार"), _GROWN, RABI, (
        Twin("गंधक की कमी", "deficiency", "छोटे कंद", ("बलुई",), "सल्फर"),
        Twin("आधार सड़न", "disease", "सड़े कंद", ("दोमट", "काली"), "ट्राइकोडर्मा"),
    )),
    Group("मिर्च", WEATHER, ("मुड़ी पत्तियाँ", "झड़ते फूल"), _BEARING, KHARIF, (
        Twin("थ्रिप्स", "pest", "रुकी बढ़वार", ("शुष्क", "साफ"), "पीले ट्रैप"),
        Twin("पीली माइट", "pest", "टेढ़े फल", ("नम", "वर्षा"), "गंधक"),
    )),
    Group("मिर्च", STAGE, ("भूरे धब्बे", "झड़ती पत्तियाँ"), _ALL, KHARIF, (
        Twin("सर्कोस्पोरा धब्बा", "disease", "रुकी बढ़वार", ("पौध", "बढ़वार"), "ताँबा"),
        Twin("एन्थ्रेक्नोज", "disease", "टेढ़े फल", ("फूल", "भराव", "पकाव"), "ताँबा"),
    )),
    Group("गन्ना", IRRIGATION, ("सूखती पत्तियाँ", "लाल तना"), _CANE, KHARIF, (
        Twin("लाल सड़न", "disease", "खोखला तना", ("नियमित", "जलभराव"), "निकासी"),
        Twin("उकठा", "disease", "रुकी बढ़वार", ("असिंचित",), "ट्राइकोडर्मा"),
    )),
    Group("गन्ना", STAGE, ("सूखी गोभ", "कटी पत्तियाँ"), _CANE, KHARIF, (
        Twin("शीर्ष बेधक", "pest", "खोखला तना", ("बढ़वार", "पकाव"), "ट्राइकोग्रामा"),
        Twin("अगेती बेधक", "pest", "रुकी बढ़वार", ("पौध",), "ट्राइकोग्रामा"),
    )),
)  # fmt: skip

# How a farmer joins two signs, how a thought argues, how an advisory speaks.
SYMPTOM_FRAMES = ("{0}, {1}", "{0} और {1}", "{0}; साथ ही {1}")
THOUGHT_TWINS = (
    "{signs}: {first} या {second}। {field} {value} है, इसलिए {diagnosis}। {measure}",
    "{signs} से {first} या {second} संभव। {field} {value} होने से {diagnosis}। {measure}",
)
THOUGHT_CLEAR = (
    "{signs}: दोनों केवल {diagnosis} में। {measure}",
    "{signs} साथ हैं, इसलिए {diagnosis}। {measure}",
)
THOUGHT_SIGNS = "{0} व {1}"
THOUGHT_MEASURE = "{stage}: {band}; {weather}: {reason}।"
NO_WEATHER_REASON = "बाधा नहीं"
ADVISORY_FRAMES = (
    "{crop} में {diagnosis} है। {action}।",
    "यह {diagnosis} है। उपाय: {action}।",
    "{crop} की समस्या {diagnosis} है, {action}।",
)

# ----------------------------------------------------------------------------------------------------------
# The grammar's tables, flattened.
# ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Problem:
    """One problem of one crop, with everything that says when it can be the diagnosis."""

    crop: str
    name: str
    kind: Kind
    signs: tuple[str, str, str]
    decided_by: str
    where: dict[str, tuple[str, ...]]
    treatment: Treatment

    @property
    def key(self) -> str:
        """Crop and name: a name alone can occur in several crops."""
        return f"{self.crop}/{self.name}"

    def visible_pairs(self, stage: str) -> list[tuple[str, str]]:
        """Return the pairs of its signs that can be seen at a stage; the shared pair comes first."""
        order = list(STAGES)
        seen = [sign for sign in self.signs if order.index(SIGNS[sign].since) <= order.index(stage)]
        return [(a, b) for i, a in enumerate(seen) for b in seen[i + 1 :]]

    def action(self, stage: str, weather: str) -> str:
        """Return the measure at a stage and in a weather, in the wording that an advisory must hold."""
        action = self.treatment.at(BAND[stage])
        return (WEATHER_RULE[weather][0] if action.weather_bound else "") + action.text


class Combination(NamedTuple):
    """What is held out as a whole: a problem at a stage in a weather."""

    problem: str
    stage: str
    weather: str


class Score(NamedTuple):
    """Whether an advisory names the right diagnosis, and the right action, and no other."""

    diagnosis: bool
    action: bool


def _flatten(group: Group) -> Iterator[Problem]:
    free = {STAGE: group.stages, WEATHER: group.weathers, SOIL: tuple(SOILS), IRRIGATION: tuple(IRRIGATIONS)}
    for twin in group.twins:
        yield Problem(
            crop=group.crop,
            name=twin.name,
            kind=twin.kind,
            signs=(*group.shared_signs, twin.third_sign),
            decided_by=group.decided_by,
            where=free | {group.decided_by: twin.where},
            treatment=TREATMENTS[twin.treatment],
        )


PROBLEMS: tuple[Problem, ...] = tuple(problem for group in GROUPS for problem in _flatten(group))
CROPS: tuple[str, ...] = tuple(dict.fromkeys(problem.crop for problem in PROBLEMS))
DIAGNOSES: tuple[str, ...] = tuple(dict.fromkeys(problem.name for problem in PROBLEMS))


def combinations(problem: Problem) -> list[Combination]:
    """List every stage and weather at which a problem can occur."""
    return [
        Combination(problem.key, stage, weather) for stage in problem.where[STAGE] for weather in problem.where[WEATHER]
    ]


def candidates(crop: str, signs: Iterable[str], fields: Mapping[str, str]) -> list[Problem]:
    """List the problems of a crop that have all the signs and can occur under the given fields (labels)."""
    wanted = set(signs)
    return [
        problem
        for problem in PROBLEMS
        if problem.crop == crop
        and wanted <= set(problem.signs)
        and all(value in problem.where[field] for field, value in fields.items())
    ]


def _digest(*parts: str) -> str:
    return hashlib.sha256("|".join(parts).encode()).hexdigest()


@cache
def held_out() -> frozenset[Combination]:
    """Return the combinations kept for validation: about a fifth of each problem's, chosen by SHA-256.

    One is held out only while training keeps the same problem at a stage of the same band and, unless it has
    but one, at the same stage in another weather and in the same weather at another stage: validation asks
    for new combinations, not for facts that training never states.
    """
    chosen: set[Combination] = set()
    for problem in PROBLEMS:
        kept = combinations(problem)
        target = max(1, round(len(kept) / 5))
        for combination in sorted(kept, key=lambda c: _digest(*c)):
            rest = [other for other in kept if other != combination]
            same_stage = any(other.stage == combination.stage for other in rest)
            same_band = any(BAND[other.stage] == BAND[combination.stage] for other in rest)
            same_weather = any(other.weather == combination.weather for other in rest)
            single_stage = len(problem.where[STAGE]) == 1
            single_weather = len(problem.where[WEATHER]) == 1
            if same_band and (same_stage or single_weather) and (same_weather or single_stage):
                kept = rest
                chosen.add(combination)
                target -= 1
            if target == 0:
                break
    return frozenset(chosen)


# ----------------------------------------------------------------------------------------------------------
# Rows.
# ----------------------------------------------------------------------------------------------------------


def make_rows(n: int, *, seed: int, split: Split) -> list[dict[str, Any]]:
    """Make `n` rows of a split; the same arguments give the same rows on every machine.

    Each row has `scenario` (a struct of Hindi strings), `thought`, `advisory`, and its ground truth:
    `diagnosis` and `action` (canonical wordings, both contained in the advisory) and `needs_two_fields` (crop
    and symptom alone leave two diagnoses possible). Problems take turns, at least two rows in five show an
    ambiguous pair of signs, and no scenario repeats among the first 100,000 rows of a call.
    """
    if n < 0:
        raise ValueError(f"the number of rows must not be negative, but is {n}")
    if split not in ("train", "validation"):
        raise ValueError(f"split must be 'train' or 'validation', not {split!r}")
    rng = random.Random(f"{split}/{seed}")
    pools = _pools(split)
    rows: list[dict[str, Any]] = []
    seen: set[tuple[str, ...]] = set()
    deck: list[Problem] = []
    while len(rows) < n:
        if not deck:
            deck = list(PROBLEMS)
            rng.shuffle(deck)
        problem = deck.pop()
        row = _row(rng, problem, rng.choice(pools[problem.key]), ambiguous=len(rows) % 5 < 2)
        scenario = tuple(row["scenario"].values())
        if scenario not in seen or len(seen) > 100_000:  # far beyond it, repeats are cheaper than retries
            seen.add(scenario)
            rows.append(row)
    return rows


def _pools(split: Split) -> dict[str, list[Combination]]:
    """Return the combinations of each problem that a split may use."""
    return {
        problem.key: [c for c in combinations(problem) if (c in held_out()) == (split == "validation")]
        for problem in PROBLEMS
    }


def _row(rng: random.Random, problem: Problem, combination: Combination, ambiguous: bool) -> dict[str, Any]:
    labels = {
        STAGE: combination.stage,
        SOIL: rng.choice(problem.where[SOIL]),
        WEATHER: combination.weather,
        IRRIGATION: rng.choice(problem.where[IRRIGATION]),
    }
    pairs = problem.visible_pairs(combination.stage)
    signs = list(pairs[0] if ambiguous or len(pairs) == 1 else rng.choice(pairs[1:]))
    rng.shuffle(signs)
    fitting = candidates(problem.crop, signs, {})
    action = problem.action(combination.stage, combination.weather)
    advisory = rng.choice(ADVISORY_FRAMES).format(crop=problem.crop, diagnosis=problem.name, action=action)
    return {
        "scenario": _scenario(rng, problem.crop, labels, signs),
        "thought": _thought(rng, problem, labels, signs, fitting),
        "advisory": advisory,
        "diagnosis": problem.name,
        "action": action,
        "needs_two_fields": len(fitting) > 1,
    }


def _scenario(rng: random.Random, crop: str, labels: Mapping[str, str], signs: Sequence[str]) -> dict[str, str]:
    worded = {field: rng.choice(FIELDS[field][label]) for field, label in labels.items()}
    symptom = rng.choice(SYMPTOM_FRAMES).format(*(rng.choice(SIGNS[sign].wordings) for sign in signs))
    return {CROP: crop, **worded, SYMPTOM: symptom}


def _thought(
    rng: random.Random,
    problem: Problem,
    labels: Mapping[str, str],
    signs: Sequence[str],
    fitting: Sequence[Problem],
) -> str:
    stage, weather = labels[STAGE], labels[WEATHER]
    band = BAND[stage]
    bound = problem.treatment.at(band).weather_bound
    measure = THOUGHT_MEASURE.format(
        stage=stage,
        band=BAND_REASON[band],
        weather=weather,
        reason=WEATHER_RULE[weather][1] if bound else NO_WEATHER_REASON,
    )
    named = THOUGHT_SIGNS.format(*signs)
    if len(fitting) == 1:
        return rng.choice(THOUGHT_CLEAR).format(signs=named, diagnosis=problem.name, measure=measure)
    return rng.choice(THOUGHT_TWINS).format(
        signs=named,
        first=fitting[0].name,
        second=fitting[1].name,
        field=problem.decided_by,
        value=labels[problem.decided_by],
        diagnosis=problem.name,
        measure=measure,
    )


# ----------------------------------------------------------------------------------------------------------
# Scoring.
# ----------------------------------------------------------------------------------------------------------


def score(answer: str, row: Mapping[str, Any]) -> Score:
    """Compare a generated advisory with a row's ground truth.

    The diagnosis is right when the row's is named and no other of the grammar's; the action likewise, where
    a measure with and without its timing ("after the rain") are two actions. Of names that contain each
    other the longest counts.
    """
    text = " ".join(unicodedata.normalize("NFC", answer).split())
    return Score(
        diagnosis=set(_names().findall(text)) == {row["diagnosis"]},
        action=set(_actions().findall(text)) == {row["action"]},
    )


def all_actions() -> set[str]:
    """Return every action the grammar can advise, timing included."""
    return {problem.action(c.stage, c.weather) for problem in PROBLEMS for c in combinations(problem)}


@cache
def _names() -> re.Pattern[str]:
    return _phrases(DIAGNOSES)


@cache
def _actions() -> re.Pattern[str]:
    timed = {
        rule + a.text
        for rule, _ in WEATHER_RULE.values()
        for t in TREATMENTS.values()
        for a in (t.early, t.mid, t.late)
    }
    return _phrases(timed)


def _phrases(phrases: Iterable[str]) -> re.Pattern[str]:
    """Match whole phrases, the longest first; a letter or vowel sign beside one makes it another word."""
    longest_first = sorted(phrases, key=len, reverse=True)
    letter = r"[\u0900-\u0963\u0966-\u097F]"  # without the dandas, which end a sentence
    return re.compile(rf"(?<!{letter})(?:{'|'.join(map(re.escape, longest_first))})(?!{letter})")


# ----------------------------------------------------------------------------------------------------------
# Tokenizer.
# ----------------------------------------------------------------------------------------------------------

END_OF_TEXT = "<|endoftext|>"
# Qwen's pattern, but marks (\p{M}) count as letters: Qwen's own cuts a Devanagari word at every vowel sign.
PRE_TOKENS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{M}\p{N}]?[\p{L}\p{M}]+|\p{N}"
    r"| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def train_tokenizer(rows: Iterable[Mapping[str, Any]], vocab_size: int = 2048) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE in Qwen's form on rendered rows, with `<|endoftext|>` as end and padding.

    All 256 bytes are in the alphabet, so any text survives encoding and decoding (in NFC, as with Qwen).
    The vocabulary is smaller than `vocab_size` where the rows run out of repeated words to merge. The chat
    markers are not in it: they are added where rows are rendered.
    """
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    if vocab_size < 257:
        raise ValueError(f"vocab_size must be at least 257 (256 bytes and {END_OF_TEXT}), but is {vocab_size}")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PRE_TOKENS), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=2,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(map(_text_without_markers, rows), trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=END_OF_TEXT,
        pad_token=END_OF_TEXT,
        clean_up_tokenization_spaces=False,
    )


def _text_without_markers(row: Mapping[str, Any]) -> str:
    parts = (DEFAULT_FORMAT.default_system, DEFAULT_FORMAT.scenario_header, render_scenario(row["scenario"]))
    return "\n".join((*parts, row["thought"], row["advisory"]))


# ----------------------------------------------------------------------------------------------------------
# The corpus on disk.
# ----------------------------------------------------------------------------------------------------------


def write_corpus(
    output: Path,
    *,
    train_rows: int = 6000,
    validation_rows: int = 240,
    seed: int = 0,
    vocab_size: int = 2048,
    overwrite: bool = False,
) -> None:
    """Write `train.parquet`, `validation.parquet`, `tokenizer/` and a `README.md` card into a new folder.

    The folder appears whole or not at all. An existing one is refused with a ValueError; with `overwrite` it
    is replaced, provided that it is empty or an earlier corpus.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    output = Path(output)
    _check_output(output, overwrite)
    for name, rows_wanted in (("train_rows", train_rows), ("validation_rows", validation_rows)):
        if rows_wanted < 1:
            raise ValueError(f"{name} must be at least 1, but is {rows_wanted}")
    train = make_rows(train_rows, seed=seed, split="train")
    validation = make_rows(validation_rows, seed=seed, split="validation")
    tokenizer = train_tokenizer(train, vocab_size)

    output.parent.mkdir(parents=True, exist_ok=True)
    partial = output.with_name(f".{output.name}.{os.getpid()}.partial")
    replaced = output.with_name(f".{output.name}.{os.getpid()}.replaced")
    try:
        partial.mkdir()
        pq.write_table(pa.Table.from_pylist(train), partial / "train.parquet")
        pq.write_table(pa.Table.from_pylist(validation), partial / "validation.parquet")
        tokenizer.save_pretrained(str(partial / "tokenizer"))
        (partial / "README.md").write_text(_card(train, validation, seed), encoding="utf-8")
        if output.exists():
            output.rename(replaced)
        partial.rename(output)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
        shutil.rmtree(replaced, ignore_errors=True)


def _check_output(output: Path, overwrite: bool) -> None:
    if not output.exists():
        return
    if not overwrite:
        raise ValueError(f"{output} exists already: choose another output folder or pass --overwrite=true")
    if not output.is_dir() or (any(output.iterdir()) and not (output / "validation.parquet").is_file()):
        raise ValueError(f"{output} is not an earlier corpus, so it is not overwritten: choose another output folder")


def _card(train: Sequence[Mapping[str, Any]], validation: Sequence[Mapping[str, Any]], seed: int) -> str:
    kinds = ", ".join(
        f"{sum(p.kind == kind for p in PROBLEMS)} {kind}" for kind in ("pest", "disease", "deficiency", "weather")
    )
    two_fields = sum(row["needs_two_fields"] for row in validation) / len(validation)
    example = validation[0]
    return f"""---
language: hi
license: apache-2.0
tags: [synthetic, agriculture, demonstration]
---

# Synthetic Hindi crop advisory

**{NOTICE}**

Made by a seeded grammar (`agri_moe/data/synthetic.py`, seed {seed}): {len(CROPS)} crops and
{len(PROBLEMS)} problems of a crop ({kinds}) under {len(DIAGNOSES)} names.

| file | rows |
|---|---|
| `train.parquet` | {len(train):,} |
| `validation.parquet` | {len(validation):,}; no combination of problem, stage and weather as in training |
| `tokenizer/` | byte-level BPE in Qwen's form, trained on the training rows |

Columns: `scenario` (a struct of Hindi strings), `thought`, `advisory`; ground truth for scoring: `diagnosis`,
`action`, `needs_two_fields` (crop and symptom alone leave two diagnoses possible; {two_fields:.0%} of the
validation rows).

One validation row:

```text
{render_scenario(example["scenario"])}

{example["thought"]}

{example["advisory"]}
```
"""
