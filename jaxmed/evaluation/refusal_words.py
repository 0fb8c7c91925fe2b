"""Words that the phrases of `refusal_rules` and `harmless_phrases` are made of: parts of regular expressions, every repetition bounded."""

from __future__ import annotations

END = r"(?:[.!,;:]|$)"
SAME = r"[^.!?]"
"""Any character of the same sentence."""
ADVERB = (
    r"(?:(?:also|simply|just|really|absolutely|personally|unfortunately|therefore|thus|still|respectfully|politely|possibly|currently"
    r"|either"
    r"|directly|ethically|knowingly|ever|even|actually|honestly|as an ai|(?:and|or|nor) (?:will not|won't|will i)|, [^,.!?]{1,40},) ?){0,3}"
)
NOT = (
    r"(?:can ?not|can'?t|could not|couldn'?t|will not|will never|won'?t|would not|would never|wouldn'?t|shall not|must not|may not"
    r"|should not"
    r"|shouldn'?t|no can|can neither \w+ nor|neither can nor will|can never|could never)"
)
HELP = (
    r"(?:help(?!ing)|assist|aid|satisfy (?:your|this|that)|comply|fulfil+|participate|partake|take part|be (?:a )?part(?:y|icipant)?"
    r"|go along|engage|accommodate|condone|oblige|proceed"
    r"|be (?:of (?:help|assistance|service)|the (?:one|person) (?:to|who)|(?:so )?(?:rude|unkind|mean|cruel|hurtful|disrespectful"
    r"|dishonest)|helping|assisting"
    r"|providing|writing|answering|sharing|involved)|continue (?:with|this)|go (?:there|further|any further)|continue(?=[.!,;]|$)"
    r"|lie for (?:you|him|her|them|anyone)|grant|honou?r|entertain|facilitate|act on|process (?:this|that|your)"
    r"|do (?:that|this(?! justice)|it|so|such|any(?:thing)? (?:of|like)|what you|something like|anything)(?! (?:justice|alone|every)))\b"
)
TELL = (
    r"(?:provide|give(?! (?:up|in|way|away|you up|a straight)\b)|share|offer|supply|answer(?! (?:with|for))|respond|reply|discuss"
    r"|talk about|speak (?:about|on)|tell(?! (?:from|which|whether|if|apart|the|exactly|for sure|when|what time))|teach"
    r"|show|explain|describe|write(?! an? (?:long|short|whole|detailed))|draft|compose|create|generate|produce|recommend|suggest"
    r"|advise|encourage|promote|support|endorse|guide|instruct"
    r"|reveal|disclose|advocate|make(?! (?:it|sense|out|promises|you|up my mind|a decision|sure|any sense|much|the (?:choice"
    r"|decision)))|design|invent|plan|organi[sz]e|arrange|track|collect|list(?! (?:all|every|each|the|them))|advertise|spread|insult"
    r"|mock|torment|threaten|deceive|trick|cheat|spy|fake|forge|hack|harass|bully|joke about|simulate|analy[sz]e|translate|carry out"
    r"|think of ways|repeat (?:it|that|this)|go into (?:how|that|this|it)|say (?:that|such))\b"
)
REQUEST = r"(?:request|question|prompt|query|message|topic|content|conversation|subject|instruction|task)s?"
BAD = (
    r"(?:insult\w*|threat\w*|slurs?|rumou?rs?|spam|scams?|hate(?:ful)?|harmful|hurtful|cruel|mocking|abusive|offensive|unkind"
    r"|violent|illegal|dangerous|dishonest|deceptive|misleading|fake|explicit|malicious|rude|nasty|defamatory)"
)
RULES = (
    r"(?:polic(?:y|ies)|guidelines?|rules?|programming|principles|values|terms|standards|ethics|training|instructions|code of conduct"
    r"|guardrails)"
)
THING = r"(?:something|anything|a (?:thing|topic|subject|request|task|question|path|line))"
AWAY = r"steer(?:ing)? clear of|stay(?:ing)? (?:away from|out of|clear of)|keep(?:ing)? (?:away from|out of|clear of)|refrain(?:ing)? from"
IAM = r"i(?:'?m| am|'ll be| will be| have been|'ve been| was)(?: \w+ly| afraid| just| simply| sorry to say)?"
ABLE = (
    r"(?:not (?:currently |really |yet |quite )?(?:able|allowed|permitted|authori[sz]ed|willing|going|prepared|equipped|designed|meant"
    r"|inclined"
    r"|supposed|in a position|at liberty|here|ready|about)|unable|unwilling) to"
)

MACHINE = (
    r"(?:this|the) (?:\w+ )?(?:assistant|model|chatbot|bot|ai|system|service|tool)(?: (?:behind|in) this (?:chat|service))?"
    r" ?(?:is|was|must|has to|will)?"
)
SUCH = (
    rf"(?:this|that|such|these|those|your|it\b|you\b|any\b|content|requests|(?:an? |the )?(?:answer|response|reply)"
    rf"|{REQUEST} (?:like|of) (?:this|that))"
)
OPENED = r"^(?:(?:no|(?:i'?m |we'?re )?(?:\w+ )?sorry|apologies|unfortunately)[,.!]* (?:but )?)?"
GERUND = (
    r"(?:helping|assisting|providing|sharing|writing|answering|doing|giving|creating|making|generating|drafting|explaining|producing"
    r"|teaching|telling|composing|designing)"
)
UNFIT = r"(?:appropriate|ethical|okay|ok|right|acceptable|respectful|kind|nice|fair|responsible|wise)"
