"""The words by which an instruction asks and refuses, and those that do neither."""

from service.domain.comments.words import words

# What comes after is refused.
REFUSALS = words(
    """no not never don't dont doesn't without less fewer nor neither hate dislike ban zero kein keine keinen keiner nicht ohne weniger
    nie pas sans moins aucun aucune jamais sin menos nunca non senza meno não sem nem"""
)
# Likewise, but refused themselves they ask: "don't skip examples".
REMOVALS = words(
    "stop avoid skip omit drop remove cut ditch lose exclude quit eliminate limit reduce vermeide évite evita"
)
ASKED, REFUSED, NEITHER = 1, -1, 0
PAIRS = {
    "no longer": REFUSED, "no more": REFUSED, "no need": REFUSED, "instead of": REFUSED, "rather than": REFUSED, "get rid": REFUSED,
    "leave out": REFUSED, "can't stand": REFUSED, "too many": REFUSED, "too much": REFUSED, "so many": REFUSED, "so much": REFUSED,
    "tired of": REFUSED, "sick of": REFUSED, "not enough": ASKED, "too few": ASKED, "too little": ASKED, "not only": NEITHER,
    "not just": NEITHER, "not many": NEITHER, "not much": NEITHER, "not necessarily": NEITHER, "no problem": NEITHER, "not sure": NEITHER,
}  # fmt: skip
# What is not there is wanted.
LACKS = words("lack lacks lacked lacking missing misses")
# What comes after is asked for, and they end an earlier refusal: "no bullets and write in prose".
ASKING = words(
    """use using write writing make keep be being give add adding include including put insert answer answering reply replying respond
    responding want wants like love prefer need needs format start starting begin beginning end ending finish close provide show produce
    say speak return stick sound send go switch ask asking favor favour try quote wrap append prepend open
    verwende benutze nutze schreib schreibe antworte mach mache gib sei halte fasse möchte utilise utilisez réponds répondez écris
    écrivez fais faites sois soyez mets donne donnez usa usar responde responder escribe escribir haz pon añade rispondi scrivi fai sii
    responda escreva quiero voglio quero veux voudrais"""
)
PREFERRING = words("prefer favor favour")
CUES = words("with in into as more only just all mit mehr avec plus con más com più auf im en em")
SIGNALS = ASKING | REFUSALS | REMOVALS | CUES
MORE = words("more mehr plus más più")
# Before a manner that is none of the comparatives they complain: "too long", "a bit formal".
DEGREES = words("too so overly bit little way excessively unnecessarily needlessly zu trop demasiado demasiada troppo")
# They tell what a reply was like, not what it should be, unless with "too" or "enough".
DESCRIBING = words(
    """is was are were you're it's that's there's isn't wasn't aren't weren't has had have seems seemed looks looked feels felt sounds
    sounded got ist war sind est était es era son"""
)
WISHES = words("should must could can would will shall please let let's ought")
# They make an instruction one for some replies only.
CONDITIONS = words("if when whenever unless until where while wenn falls sobald si quand lorsque cuando quando se")
# They begin a thought of its own.
CONTRASTS = words("but aber mais pero however yet though")

DETERMINERS = words(
    """the a an your my our his her their this that these those every each any all some of no one deine deiner die der ta ton tu la il"""
)
# Of a noun after these a certain one is spoken of: "explain the code".
DEFINITE = words("the this that these those my your our")
# Before "long" they speak of time.
TEMPORAL = words("how as last take takes")
# What a manner may be said of.
REPLIES = words(
    """answer answers reply replies response responses message messages output outputs text texts explanation explanations
    version versions everything content it this that them wording one ones thing things tone style language voice register
    writing manner letters characters words antwort antworten stil ton sprache réponse réponses respuesta respuestas texto
    risposta risposte resposta respostas"""
)
# They neither ask nor refuse, nor are they what an instruction is about.
NEUTRAL = (REPLIES | DETERMINERS | WISHES | DEGREES | CONTRASTS) | words(
    """i i'd i'm i'll i've me you your we us he she they to for on at by from and or nor also always ever again both entire
    whole much many lot lots few several such very really quite even still now today then there here about around instead
    way ways kind sort next time times future going forward thank thanks ok okay yes well extra unnecessary silly annoying
    stupid fancy simple clear plain proper nice good great better best rather possible general than least most do does did
    doing what which why enough maybe perhaps rid out off problem often end start beginning ich mir du sie bitte immer einen
    eine ein den dem das deinen viele sehr le les de des du un une je me moi toujours très te vous plaît el los las yo por
    favor siempre muy lo gli di per una um uma o os as do da"""
)
# A noun with no more than these around it is asked for: "bullet points, please".
BARE = words("please always only just instead and or all bitte lieber immer svp toujours por favor siempre")

# Without one of these a question or a language is mentioned, not asked for.
QUESTION_CUES = words("ask asking end ends ending finish finishing close closing conclude follow")
LANGUAGE_CUES = words("in auf en em use using speak to into only write sprich habla parle")

NUMBERS = {
    "one": 1, "single": 1, "two": 2, "three": 3, "four": 4, "five": 5, "six": 6, "seven": 7, "eight": 8, "nine": 9, "ten": 10, "twelve": 12,
    "fifteen": 15, "twenty": 20, "thirty": 30, "forty": 40, "fifty": 50, "hundred": 100,
}  # fmt: skip
COUNTED = {unit + s: f"{unit}s" for unit in ("word", "sentence", "paragraph") for s in ("", "s")}
AT_MOST = words("max maximum most within up tops")
UNDER = words("under below less fewer")
AT_LEAST = words("least minimum min over above more")
OR_LESS, OR_MORE = (("or", "less"), ("or", "fewer"), ("at", "most")), (("or", "more"), ("at", "least"))
OTHERWISE_COUNTED = words("first last next the")

OPENERS = words("start starting starts begin beginning begins open opening opens")
CLOSERS = words("end ending ends finish finishing finishes close closing closes conclude sign")
