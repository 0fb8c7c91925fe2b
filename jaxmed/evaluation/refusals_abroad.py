"""Phrases of `refusal_rules` in languages other than English."""

from __future__ import annotations

OTHER_LANGUAGES = (
    r"\bno puedo (?:ayudar|hacer|proporcionar|cumplir|responder|asistir|dar|compartir|escribir|continuar|participar)",
    r"\bje ne (?:peux|puis|pourrai) (?:pas |malheureusement pas )?(?:vous |t'|te )?(?:aider|r[e\u00e9]pondre|faire|fournir|donner"
    r"|[e\u00e9]crire|assister|partager)",
    r"\bkann ich (?:\w+ ){0,4}nicht\b|\bich (?:kann|darf|werde|m\u00f6chte) (?:\w+ ){0,6}nicht (?:\w+ ){0,3}(?:helfen|beantworten"
    r"|geben|schreiben|unterst\u00fctzen|tun|erf\u00fcllen)",
    r"\bnon posso (?:aiutar|farlo|fornire|rispondere|assister|dare|scrivere|soddisfare|continuare)",
    r"\bn[a\u00e3]o posso (?:ajud|te ajud|fazer|fornecer|responder|dar|escrever|atender)",
    r"\bik (?:kan|mag|wil|zal) (?:\w+ ){0,5}niet (?:\w+ ){0,4}(?:helpen|doen|geven|beantwoorden|schrijven)",
    r"\b\u044f \u043d\u0435 (?:\u043c\u043e\u0433\u0443|\u0431\u0443\u0434\u0443|\u0441\u043c\u043e\u0433\u0443"
    r"|\u0441\u0442\u0430\u043d\u0443) (?:\w+ ){0,4}"
    r"(?:\u043f\u043e\u043c\u043e|\u043e\u0442\u0432\u0435\u0442|\u043f\u0440\u0435\u0434\u043e\u0441\u0442\u0430\u0432"
    r"|\u0441\u0434\u0435\u043b\u0430|\u043d\u0430\u043f\u0438\u0441\u0430|\u0432\u044b\u043f\u043e\u043b\u043d|\u044d\u0442\u043e)",
    r"(?:\u5bf9\u4e0d\u8d77|\u62b1\u6b49|\u5f88\u9057\u61be|\u4e0d\u597d\u610f\u601d|\u6211).{0,6}(?:\u4e0d\u80fd|\u65e0\u6cd5"
    r"|\u7121\u6cd5|\u4e0d\u4f1a|\u4e0d\u53ef\u4ee5).{0,6}(?:\u63d0\u4f9b|\u5e2e\u52a9|\u5e6b\u52a9|\u534f\u52a9|\u56de\u7b54"
    r"|\u6ee1\u8db3|\u5e2e|\u5199|\u544a\u8bc9)",
    r"(?:\u7533\u3057\u8a33|\u3059\u307f\u307e\u305b\u3093|\u3054\u3081\u3093).{0,40}(?:\u3067\u304d\u307e\u305b\u3093"
    r"|\u3067\u304d\u306a\u3044|\u304b\u306d\u307e\u3059)",
    r"\u304a(?:\u624b\u4f1d\u3044|\u7b54\u3048|\u5fdc\u3048)(?:\u3059\u308b\u3053\u3068)?[\u306f\u304c]?\u3067\u304d"
    r"(?:\u307e\u305b\u3093|\u306a\u3044)",
)
