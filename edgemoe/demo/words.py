"""The word lists of the shipped model's tasks."""

from __future__ import annotations

NAMES = (
    "Anna Ben Cara Dan Ella Finn Gina Hugo Iris Jack Kara Liam Mia Noah Olga Paul Quinn Rosa Sam Tara "
    "Uma Vera Will Xena Yuri Zoe Alex Bella Carl Dora Emil Fay Greta Hans Ida Jonas"
).split()

ANIMALS = "fox cat dog bear owl wolf mouse horse duck goat rabbit turtle otter badger crow hen".split()

THINGS = (
    "key map lamp coin book bell ring stone boat kite hat cup drum rope box letter "
    "shell feather mirror clock basket ladder button candle"
).split()

PLACES = "river forest garden bridge harbour market tower meadow cave hill village lake".split()

COLOURS = "red blue green yellow white black brown grey pink golden silver purple".split()

MOODS = "happy proud tired calm brave glad quiet curious".split()

WEATHERS = "sunny rainy windy cold warm foggy snowy bright".split()

WORDS = (
    "the a of and to in is it you that he was for on are with as his they be at one have this from by "
    "hot but some what there we can out other were all your when up use word how said each she which do "
    "their time if will way about many then them would write like so these her long make thing see him "
    "two has look more day could go come did my sound no most number who over know water than call first "
    "people may down side been now find any new work part take get place made live where after back "
    "little only round man year came show every good me give our under name very through just form much "
    "great think say help low line before turn cause same mean differ move right boy old too does tell "
    "sentence set three want air well also play small end put home read hand port large spell add even "
    "land here must big high such follow act why ask men change went light kind off need house picture "
    "try us again animal point mother world near build self earth father head stand own page should "
    "country found answer school grow study still learn plant cover food sun four thought let keep eye "
    "never last door between city tree cross since hard start might story saw far sea draw left late run"
).split()

RARE = "café naïve über señor piñata Zürich Ελλάδα мир 日本 東京 ☕ 🦊 façade œuvre smörgås ünits".split()

CAPITALS = {
    "France": "Paris", "Spain": "Madrid", "Italy": "Rome", "Germany": "Berlin", "Portugal": "Lisbon",
    "Greece": "Athens", "Poland": "Warsaw", "Norway": "Oslo", "Sweden": "Stockholm", "Finland": "Helsinki",
    "Denmark": "Copenhagen", "Austria": "Vienna", "Hungary": "Budapest", "Ireland": "Dublin",
    "Belgium": "Brussels", "Iceland": "Reykjavik", "Japan": "Tokyo", "China": "Beijing", "India": "Delhi",
    "Egypt": "Cairo", "Kenya": "Nairobi", "Ghana": "Accra", "Peru": "Lima", "Chile": "Santiago",
    "Cuba": "Havana", "Canada": "Ottawa", "Mexico": "Mexico City", "Brazil": "Brasilia", "Turkey": "Ankara",
    "Iran": "Tehran", "Iraq": "Baghdad", "Nepal": "Kathmandu",
}  # fmt: skip

FUNCTION_WORDS = (
    "area score price speed weight height width length depth volume rate cost sum gain loss power "
    "force mass age level size count index value offset scale ratio limit budget"
).split()
