"""Words that say how good a reply was, and those that say nothing: what of a comment is no instruction."""

from collections.abc import Sequence

from service.domain.comments.text import WORD
from service.domain.comments.words import phrases, words

STRONG, WEAK = 1.0, 0.5

PRAISE = """
    great good nice awesome amazing excellent perfect perfectly fantastic wonderful brilliant superb outstanding helpful helps helped
    useful cool best lovely love loved loving like liked likes enjoyed correct right accurate impressive exactly yay bravo wow
    sense works worked thumbsup insightful incredible beautiful favorite favourite
    gut super toll prima klasse perfekt hilfreich richtig ausgezeichnet wunderbar spitze gefällt gefallen genial
    bon bonne bien parfait parfaite excellente utile aime j'aime n'aime adore j'adore formidable magnifique juste
    bueno buena buenísimo perfecto perfecta excelente útil gusta gustó encanta increíble correcto
    buono buona bene ottimo ottima perfetto perfetta piace bello bom boa ótimo ótima perfeito perfeita gosto gostei adorei
    хорошо отлично супер прекрасно нравится полезно 好 很好 非常好 不错 太好了 太棒了 棒 很棒 完美 喜欢 很有用 有用 厉害
    いい 良い 良かった すごい 最高 素晴らしい 完璧 좋아요 좋아 최고 훌륭해요 جيد ممتاز رائع مفيد अच्छा बढ़िया शानदार उत्तम
    👍 👌 👏 ❤ 💯 😍 🥰 🎉 😀 😃 😄 😊 🙂 🤩 ⭐ 🔥 💪 ✅ 😁 ☺ 🌟
"""
BLAME = """
    bad wrong terrible awful horrible poor poorly useless unhelpful incorrect inaccurate false garbage trash rubbish nonsense crap worst
    worse sucks suck sucked disappointing disappointed disappointment hate hated dislike disliked lame stupid dumb annoying boring
    confusing confused pathetic ridiculous unacceptable unusable fail failed failure broken pointless worthless ugh boo wtf thumbsdown
    schlecht schlechte falsch furchtbar schrecklich nutzlos unbrauchbar mies blöd dumm
    mauvais mauvaise nul nulle faux inutile horriblement décevant
    malo mala mal incorrecto horrible inútil pésimo pésima equivocado
    cattivo male sbagliato pessimo pessima errado ruim péssimo péssima
    плохо ужасно неправильно бесполезно 差 很差 太差了 不好 没用 错 错了 不对 垃圾 不喜欢 糟糕
    ダメ だめ 悪い ひどい 違う 間違い 최악 나빠요 별로 سيء سيئ خطأ बेकार बुरा गलत खराब
    👎 😡 😠 💩 😞 🤮 😢 😤 🤬 ❌ 😒 🙄 😩 😭
"""
WEAK_PRAISE = "ok okay fine decent alright acceptable okayish passable better 还行 可以 ठीक"
WEAK_BLAME = "meh mediocre average underwhelming lacking weak blah bof geht mittelmäßig 一般 😐 😕 🤷 🫤"

PRAISE_PHRASES = """
    well done, thumbs up, way to go, spot on, couldn't be better, sehr gut, très bien, muy bien, muito bem, molto bene, बहुत अच्छा
"""
BLAME_PHRASES = """
    no help, doesn't help, didn't help, does not help, did not help, doesn't work, does not work, didn't work, did not work, too bad,
    waste of time, thumbs down, not what i asked, not what i asked for, not what i wanted, not what i meant
"""
WEAK_BLAME_PHRASES = """
    could be better, could be much better, could have been better, could've been better, can be better, do better, be better, needs work,
    needs improvement, so so, pas terrible
"""

QUALITY = {
    **dict.fromkeys(words(PRAISE), STRONG),
    **dict.fromkeys(words(BLAME), -STRONG),
    **dict.fromkeys(words(WEAK_PRAISE), WEAK),
    **dict.fromkeys(words(WEAK_BLAME), -WEAK),
}
PHRASES = {
    **dict.fromkeys(phrases(PRAISE_PHRASES), STRONG),
    **dict.fromkeys(phrases(BLAME_PHRASES), -STRONG),
    **dict.fromkeys(phrases(WEAK_BLAME_PHRASES), -WEAK),
}

NEGATIONS = words(
    """not no never isn't wasn't don't doesn't didn't aren't hardly barely dont doesnt didnt isnt wasnt nothing neither nor without
    nicht kein keine nie pas jamais nunca non mai não не नहीं"""
)

# What may stand around praise or blame without making it an instruction.
AROUND = words(
    """a an the this that these it its it's that's is was are were be been i i'm me my we you your am to of at all for so very really
    quite pretty much just such and but or in by as with what how here there one ones thing job work stuff answer answers reply
    replies response responses result output text explanation absolutely totally completely simply kind bit little lot lots again
    now today far thanks thank thx please sorry at on did does do seems seem looks look sounds sound feels feel find found
    think honestly actually still even only makes make made could would should one out well also up man guys dude oh ah hm hmm wow
    yes yeah das ist war die der dies diese antwort sehr gar mir ich es so ganz echt wirklich leider einfach c'est c'était est était
    la le les un une ce cette réponse très ça me n'est je vraiment es está esta este la el una un respuesta muy me lo fue
    eso è era molto questa questo risposta mi é muito foi resposta isso essa o это очень мне ответ 这 这个 回答 बहुत है यह جدا هذا"""
)

GREETINGS = words("hi hello hey hiya dear greetings hallo bonjour salut hola ciao olá oi привет नमस्ते مرحبا 你好 您好")
# Who is greeted, other than by name.
GREETED = words("there all again everyone assistant bot ai friend team folks sir madam chatbot")
COURTESY_PHRASES = phrases(
    """good morning, good afternoon, good evening, good day, best regards, kind regards, have a nice day, guten tag, guten morgen,
    schönen tag, viele grüße, bonne journée, buenos días, buenas tardes, buongiorno, bom dia, boa tarde"""
)
COURTESY = GREETINGS | words(
    """thanks thank you thx ty cheers please pls plz kindly sorry so much very a lot many for again bye goodbye regards welcome danke
    dankeschön bitte vielen dank schön merci beaucoup svp bonsoir gracias muchas por favor grazie mille obrigado obrigada muito
    спасибо 谢谢 谢谢你 多谢 请 ありがとう ありがとうございます 감사합니다 شكرا شكراً धन्यवाद 🙏"""
)
NOTHING = COURTESY | words(
    """yes no yeah yep nope yup maybe hm hmm um uh oh ah well huh and but or this that it is i me test testing lol haha what why how ja
    nein oui non sí si sim não да нет n na none nothing comment feedback"""
)
THANKS_FOR = tuple(
    f"{thanks} "
    for thanks in phrases(
        """thanks for, thank you for, thank you so much for, thank you very much for, thanks a lot for, many thanks for, thx for,
        danke für, vielen dank für, merci pour, gracias por, grazie per, obrigado por, obrigado pela, obrigada por"""
    )
)

# More words than this are about something.
MAX_UNSPECIFIC_WORDS = 12
_KNOWN = AROUND | NEGATIONS | QUALITY.keys() | {word for phrase in PHRASES for word in phrase.split()}


def quality(clause: str) -> float | None:
    """What a clause says of a reply's quality, in [-1, 1]: 0 for nothing at all, None if it is about something specific."""
    head = clause[:200].strip()
    folded = head.casefold().replace("’", "'")
    words = WORD.findall(folded)
    if folded.startswith(THANKS_FOR) or _is_greeting(words, head) or " ".join(words) in COURTESY_PHRASES:
        return 0.0
    if all(w in NOTHING or (_is_wordless(w) and w not in QUALITY) for w in words):
        return 0.0
    if len(words) > MAX_UNSPECIFIC_WORDS or not all(w in _KNOWN or _is_wordless(w) for w in words):
        return None
    return _score(words)


def _is_greeting(words: Sequence[str], clause: str) -> bool:
    """ "Hello there", "Hi Bob"."""
    if not words or words[0] not in GREETINGS or len(words) > 3:
        return False
    return all(w in GREETED for w in words[1:]) or (len(words) == 2 and clause[len(words[0]) :].lstrip()[:1].isupper())


def _is_wordless(word: str) -> bool:
    """Digits and symbols, which alone ask for nothing."""
    return not any(c.isalpha() for c in word)


def _score(words: Sequence[str]) -> float | None:
    sentence = f" {' '.join(words)} "
    for phrase, score in PHRASES.items():
        if f" {phrase} " in sentence and all(w in AROUND for w in sentence.replace(phrase, "").split()):
            return score
    if words[0] == "be":  # "be nice" asks for something
        return None
    scores: list[float] = []
    negated = False
    for word in words:
        if word in QUALITY:
            scores.append(_negated(QUALITY[word]) if negated else QUALITY[word])
            negated = False
        elif word in NEGATIONS:
            negated = True
        elif word not in AROUND and not _is_wordless(word):
            return None
    if negated and scores:  # "gefällt mir nicht"
        scores[-1] = _negated(scores[-1])
    return total(scores) if scores else None


def _negated(score: float) -> float:
    """Not good is bad, but not bad is only half good."""
    return -score if score > 0 else WEAK


def total(scores: Sequence[float]) -> float:
    """The prevailing opinion, as strong as the strongest word for it; 0 where they are even."""
    direction = sum(scores)
    if direction == 0:
        return 0.0
    return max((s for s in scores if s * direction > 0), key=abs)
