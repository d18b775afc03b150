"""Lists of names, written for this project: given and family names by language, places, nationalities, organisations.

They have two uses: stand-ins are drawn from them (`pseudonyms.py`), and the tagger's training sentences are filled
with
them and with names made in their likeness (`tagger_text.py`). They are common names, of nobody in particular.
"""

import re


def _by_language(lines: str) -> dict[str, list[str]]:
    rows = (line.partition(":") for line in re.split(r"\n(?! )", lines.strip()))
    return {language.strip(): names.split() for language, _, names in rows}


def _listed(text: str) -> list[str]:
    return [" ".join(part.split()) for part in text.split(",") if part.strip()]


GIVEN = _by_language("""
english: James Mary John Linda William Susan Thomas Karen Daniel Nancy Matthew Betty Mark Sandra Steven Ashley Andrew
    Emily Joshua Donna Kevin Michelle Brian Carol Edward Amanda Ronald Laura Anthony Deborah Ryan Sharon Gary
    Cynthia Nicholas Kathleen Eric Amy Stephen Angela Larry Brenda Justin Emma Scott Samantha Frank Rachel Raymond
    Janet Jack Heather Dennis Diane Jerry Olivia Tyler Julie Aaron Joyce Henry Victoria Adam Kelly Peter Lauren
    Nathan Christina Walter Joan Kyle Evelyn Harold Judith Carl Megan Arthur Alice Roger Ann Lawrence Jean Jesse
    Doris Dylan Hannah Bryan Martha Billy Gloria Bruce Teresa Willie Sara Alan Rose Ralph Grace Logan Judy Roy Chloe
    Oscar Freya Alfie Poppy Harriet Nigel Trevor Fiona Gareth Rhys Hamish Isla Callum Siobhan Declan Niamh Sean
    Ciara
german: Hans Ursula Klaus Monika Wolfgang Petra Juergen Sabine Dieter Renate Manfred Helga Uwe Karin Bernd Brigitte
    Holger Ingrid Matthias Andrea Stefan Gabriele Rainer Heike Torsten Silke Joachim Anke Friedrich Lieselotte
    Günther Jürgen Käthe Björn Sören Jörg
french: Jean Marie Pierre Nathalie Philippe Isabelle Laurent Sylvie Nicolas Catherine Olivier Christine
    Thierry Valérie
    Julien Céline Éric François Aurélie Mathieu Élodie Guillaume Amélie Benoît Chantal Gilles Odile Yves Brigitte
    Raphaël Margaux Théo Léa Chloé Hélène Jérôme
spanish: José María Antonio Carmen Manuel Ana Francisco Isabel David Dolores Javier Pilar Carlos Teresa Miguel Rosa
    Rafael Cristina Pedro Lucía Ángel Elena Alejandro Marta Fernando Mercedes Sergio Raquel Pablo Beatriz Jorge
    Rocío Alberto Nuria Álvaro Inés Iván Sofía Joaquín Ximena Guadalupe Esperanza
portuguese: João Maria Paulo Ana Luís Fernanda Rui Márcia Tiago Juliana Gonçalo Beatriz Caio Letícia Thiago
    Camila Vinícius
    Larissa Otávio Débora Estevão Conceição Lourenço
italian: Giuseppe Maria Giovanni Anna Antonio Giulia Marco Chiara Luca Francesca Matteo Sara Alessandro
    Valentina Lorenzo
    Martina Andrea Elisa Salvatore Paola Vincenzo Rosa Stefano Ilaria Niccolò Benedetta Raffaele Concetta
dutch: Jan Johanna Pieter Anneke Kees Marieke Henk Saskia Willem Femke Gerrit Liesbeth Bram Sanne Joost Maaike Thijs
    Lotte Ruud Ineke Sjoerd Wouter
nordic: Lars Ingrid Erik Karin Anders Kristina Per Astrid Nils Birgitta Olof Sigrid Magnus Solveig Bjørn Randi Øyvind
    Åse Søren Mette Jens Kirsten Rasmus Lærke Einar Guðrún Ólafur Sigríður Håkon Torbjørn Linnéa Göran Åke
finnish: Matti Tuula Juhani Anneli Heikki Päivi Jukka Riitta Antti Minna Pekka Kaarina Veikko Sinikka Ville Aino Eero
    Hilkka Jyrki Väinö
polish: Piotr Anna Krzysztof Katarzyna Andrzej Małgorzata Tomasz Agnieszka Paweł Barbara Marcin Ewa Michał Magdalena
    Grzegorz Zofia Wojciech Jadwiga Zbigniew Bożena Łukasz Stanisław Mirosława
czech: Jiří Hana Petr Lenka Tomáš Kateřina Jaroslav Věra Zdeněk Alena Miroslav Jitka Václav Ludmila Ondřej Šárka
    Vojtěch Božena Radek Ľubica Štefan Zuzana
hungarian: László Éva István Katalin Zoltán Ilona Ferenc Erzsébet Gábor Judit Attila Ágnes Sándor Zsuzsanna
    Béla Piroska
    Tamás Réka Ödön Csaba
balkan: Dragan Milica Nikola Jelena Zoran Ivana Goran Snežana Marko Vesna Luka Mirjana Dušan Gordana Ivan
    Ljubica Boris
    Nada Elena Ion Mihai Ioana Vasile Gheorghe Ştefan Radu Dimitar Tsvetana Arben Blerta
slavic: Ivan Olga Sergei Natalia Dmitri Tatiana Alexei Svetlana Vladimir Irina Andrei Lyudmila Mikhail Galina Yuri
    Ekaterina Oleg Oksana Bohdan Yaroslava Volodymyr Nadezhda Konstantin Anastasia
turkish: Mehmet Fatma Mustafa Ayşe Ahmet Emine Hüseyin Zeynep İbrahim Elif Murat Hatice Yusuf Gülsüm Emre Özlem Çağlar
    Şebnem Kemal Nurcan
arabic: Mohammed Fatima Ahmed Aisha Omar Khadija Hassan Layla Karim Noor Youssef Amina Tariq Salma Khalid Zainab Bilal
    Rania Mustafa Huda Faisal Leila Abdullah Samira Nasser Yasmin
hebrew: Yosef Miriam Avraham Tamar Moshe Shira Eitan Noa Yael Dov Rivka Itai Chana Menachem Liora
persian: Reza Maryam Hossein Zahra Mehdi Shirin Dariush Parisa Babak Nasrin Farhad Leyla Kambiz Golnaz
indian: Rajesh Priya Amit Sunita Sanjay Anjali Vikram Lakshmi Arjun Deepa Suresh Kavita Ravi Meena Anil Pooja Rahul
    Sneha Manoj Divya Karthik Shweta Gopal Indira Harpreet Gurpreet Jaswinder Nilufar Rukmini Venkatesh
chinese: Wei Fang Ming Li Jun Xiu Lei Hui Qiang Yan Jian Mei Hao Ying Peng Xia Yong Ling Zhiqiang Xiaoming
    Jingyi Yuxuan
    Haoran Meiling
japanese: Hiroshi Yuki Takashi Keiko Kenji Sachiko Satoshi Naoko Akira Tomoko Haruto Sakura Daiki Aiko Kazuo Michiko
    Shinji Emi Ryota Noriko
korean: Minjun Seoyeon Jihoon Jiwoo Hyunwoo Minji Dongwook Eunji Sungho Hyejin Jaehyun Soojin Youngho Kyungsook Ji-won
    Min-ho
vietnamese: Nguyet Minh Tuan Linh Hung Thao Duc Huong Quang Trang Binh Ngoc Long Phuong Khanh Hien
african: Kwame Ama Chinedu Ngozi Oluwaseun Folake Thabo Nomsa Juma Wanjiru Kofi Abena Sipho Zanele Emeka Adaeze Tendai
    Rutendo Mamadou Aminata Ousmane Fatou Baraka Neema Tesfaye Hiwot
greek: Giorgos Eleni Dimitris Katerina Nikos Sofia Kostas Vasiliki Yannis Ioanna Panagiotis Despina Stavros Foteini
pacific: Budi Siti Agus Dewi Bayu Putri Joko Sri Juan Maricel Rodrigo Analyn Tama Aroha Wiremu Mele Sione Malia
""")

FAMILY = _by_language("""
english: Smith Johnson Brown Taylor Wilson Davies Evans Walker White Roberts Green Hall Thompson Wright Hughes Edwards
    Turner Hill Moore Clark Harrison Scott Young Morris King Watson Baker Patterson Morgan Allen Cooper Parker
    Bennett Bailey Cook Shaw Marshall Collins Bell Richardson Miller Cox Gray Chapman Mason Webb Rogers Foster Hunt
    Mills Holmes Palmer Knight Barnes Fisher Ellis Jenkins Murray Dixon Harvey Pearson Graham Fletcher Howard
    Andrews Reynolds Ford Elliott Fox Kennedy Russell Armstrong Carter Burton Wells Lawson Spencer Payne Gordon
    Simpson Crawford Hawkins Dunn Perry Pearce Porter Woods Owens Bradley Sutton Stone Whitfield Cartwright Ashworth
    Pemberton Hathaway Lockhart O'Connor McCarthy MacDonald O'Neill Fitzgerald Gallagher McLean McKenzie O'Brien
    Byrne Doyle
german: Müller Schmidt Schneider Fischer Weber Meyer Wagner Becker Schulz Hoffmann Koch Bauer Richter Klein Wolf
    Schröder Neumann Schwarz Zimmermann Braun Krüger Hartmann Lange Krause Lehmann Köhler Maier Kaiser Vogel
    Friedrich Günther Winkler Baumann Dietrich Kuhn Voigt Jäger Schreiber Weiß Steinbach Lindemann
french: Martin Bernard Dubois Durand Moreau Laurent Lefebvre Leroy Roux Fournier Girard Bonnet Dupont Lambert Fontaine
    Rousseau Vincent Mercier Blanc Guérin Boyer Garnier Chevalier Faure Gauthier Perrin Lemoine Besson Charpentier
    Deschamps Beauchamp Lévêque
spanish: García Rodríguez González Fernández López Martínez Sánchez Pérez Gómez Martín Jiménez Ruiz
    Hernández Díaz Moreno
    Muñoz Álvarez Romero Alonso Gutiérrez Navarro Torres Domínguez Vázquez Ramos Gil Ramírez Serrano Blanco Molina
    Morales Suárez Ortega Delgado Castro Ortiz Rubio Marín Sanz Iglesias Medina Castillo Cortés
portuguese: Silva Santos Ferreira Pereira Oliveira Costa Rodrigues Martins Sousa Fernandes Gonçalves Gomes
    Lopes Marques
    Alves Almeida Ribeiro Pinto Carvalho Teixeira Moreira Correia Mendes Nunes Cardoso Araújo Barbosa Assunção
italian: Rossi Russo Ferrari Esposito Bianchi Romano Colombo Ricci Marino Greco Bruno Gallo Conti Mancini
    Costa Giordano
    Rizzo Lombardi Moretti Barbieri Fontana Santoro Mariani Rinaldi Caruso Ferrara Galli Martini Leone Longo Gentile
    Marchetti D'Angelo
dutch: Jansen Bakker Visser Smit Meijer Mulder Bos Vos Peters Hendriks Dekker Brouwer Dijkstra Hoekstra Kuipers
    Verhoeven Willems Postma Veenstra Schouten Wijnands
nordic: Andersson Johansson Karlsson Nilsson Eriksson Larsson Olsson Persson Svensson Gustafsson Hansen Olsen Larsen
    Andersen Pedersen Nielsen Kristensen Haugen Lindqvist Bergström Sjöberg Nyström Halvorsen Strand Jónsdóttir
    Sigurðsson Bjarnadóttir Östlund Åkerman Sørensen
finnish: Korhonen Virtanen Mäkinen Nieminen Mäkelä Hämäläinen Laine Heikkinen Koskinen Järvinen Lehtonen Saarinen
    Salminen Heinonen Niemi Rantanen
polish: Nowak Kowalski Wiśniewski Wójcik Kowalczyk Kamiński Lewandowski Zieliński Szymański Woźniak
    Dąbrowski Kozłowski
    Jankowski Mazur Krawczyk Piotrowska Grabowska Pawłowska Michalska
czech: Novák Svoboda Novotný Dvořák Černý Procházka Kučera Veselý Horák Němec Marek Pospíšil Hájek Králová Růžičková
    Benešová Fialová Šimková Kováčová
hungarian: Nagy Kovács Tóth Szabó Horváth Varga Kiss Molnár Németh Farkas Balogh Papp Takács Juhász Lakatos Mészáros
    Szilágyi Gulyás
balkan: Petrović Jovanović Nikolić Marković Ilić Stanković Horvat Babić Marić Kovačević Popescu Ionescu Dumitru Stan
    Munteanu Dimitrov Georgieva Ivanov Hoxha Krasniqi
slavic: Ivanov Smirnova Kuznetsov Popova Vasiliev Petrova Sokolov Mikhailova Fedorov Morozova Volkov Alekseeva
    Shevchenko Kovalenko Bondarenko Tkachenko Kravchuk Lysenko
turkish: Yılmaz Kaya Demir Çelik Şahin Yıldız Öztürk Aydın Özdemir Arslan Doğan Kılıç Aslan Çetin Koç
arabic: Hassan Ali Ibrahim Khalil Mansour Haddad Saleh Aziz Rahman Nasser Farouk Qasim al-Masri al-Hashimi Abdallah
    Khoury Bakri Jaber Shaheen Darwish
hebrew: Cohen Levi Mizrahi Peretz Friedman Katz Goldberg Shapiro Rosenthal Ben-David Azoulay Rabinovich
persian: Hosseini Ahmadi Karimi Rezaei Moradi Jafari Sadeghi Tehrani Shirazi Kazemi
indian: Sharma Patel Singh Kumar Gupta Reddy Iyer Nair Das Mehta Joshi Rao Chatterjee Mukherjee Banerjee Desai Kapoor
    Malhotra Verma Agarwal Pillai Menon Bhatt Chowdhury Khan Siddiqui Kaur Gill Krishnamurthy
chinese: Wang Li Zhang Liu Chen Yang Huang Zhao Wu Zhou Xu Sun Ma Zhu Hu Guo He Lin Luo Zheng Liang Xie Tang Deng Feng
    Cheung Wong Leung Lau
japanese: Sato Suzuki Takahashi Tanaka Watanabe Ito Yamamoto Nakamura Kobayashi Kato Yoshida Yamada Sasaki
    Matsumoto Inoue
    Kimura Hayashi Shimizu Mori Ishikawa
korean: Kim Lee Park Choi Jung Kang Cho Yoon Jang Lim Han Shin Seo Kwon Hwang
vietnamese: Nguyen Tran Le Pham Hoang Phan Vu Dang Bui Do Ho Ngo Duong Ly
african: Mensah Okafor Adeyemi Nkosi Dlamini Mwangi Otieno Diallo Traoré Ndiaye Boateng Owusu Balogun Eze Moyo Banda
    Kamau Abebe Bekele Keita
greek: Papadopoulos Georgiou Nikolaidis Pappas Vlachos Ioannidis Karagiannis Economou Antoniou Makris
pacific: Santoso Wijaya Hidayat Reyes Cruz Bautista Dela-Cruz Mendoza Tuilagi Parata Ngata Latu Fonoti
""")


def _parted(text: str) -> list[str]:
    """Cut at bars; a part that must begin with a blank shows it as an open box."""
    return [" ".join(part.split()).replace("␣", " ") for part in text.split("|")]


COUNTRIES = _listed("""
Afghanistan, Albania, Algeria, Andorra, Angola, Argentina, Armenia, Australia, Austria, Azerbaijan, Bahamas, Bahrain,
Bangladesh, Barbados, Belarus, Belgium, Belize, Benin, Bhutan, Bolivia, Bosnia and Herzegovina, Botswana, Brazil,
Brunei, Bulgaria, Burkina Faso, Burundi, Cambodia, Cameroon, Canada, Cape Verde, Chad, Chile, China, Colombia, Congo,
Costa Rica, Croatia, Cuba, Cyprus, Czech Republic, Denmark, Djibouti, Dominica, Ecuador, Egypt, El Salvador, Eritrea,
Estonia, Ethiopia, Fiji, Finland, France, Gabon, Gambia, Georgia, Germany, Ghana, Greece, Greenland, Grenada,
Guatemala, Guinea, Guyana, Haiti, Honduras, Hungary, Iceland, India, Indonesia, Iran, Iraq, Ireland, Israel, Italy,
Ivory Coast, Jamaica, Japan, Jordan, Kazakhstan, Kenya, Kuwait, Kyrgyzstan, Laos, Latvia, Lebanon, Lesotho, Liberia,
Libya, Liechtenstein, Lithuania, Luxembourg, Madagascar, Malawi, Malaysia, Maldives, Mali, Malta, Mauritania,
Mauritius, Mexico, Moldova, Monaco, Mongolia, Montenegro, Morocco, Mozambique, Myanmar, Namibia, Nepal, Netherlands,
New Zealand, Nicaragua, Niger, Nigeria, North Macedonia, Norway, Oman, Pakistan, Panama, Papua New Guinea, Paraguay,
Peru, Philippines, Poland, Portugal, Qatar, Romania, Russia, Rwanda, Samoa, San Marino, Saudi Arabia, Senegal, Serbia,
Seychelles, Sierra Leone, Singapore, Slovakia, Slovenia, Somalia, South Africa, South Korea, Spain, Sri Lanka, Sudan,
Suriname, Sweden, Switzerland, Syria, Taiwan, Tajikistan, Tanzania, Thailand, Togo, Tonga, Trinidad and Tobago,
Tunisia, Turkey, Turkmenistan, Uganda, Ukraine, United Arab Emirates, United Kingdom, United States, Uruguay,
Uzbekistan, Vanuatu, Venezuela, Vietnam, Yemen, Zambia, Zimbabwe, England, Scotland, Wales, Northern Ireland, the
United States, the Netherlands, the Philippines, Hong Kong, Puerto Rico
""")
CITIES = _listed("""
London, Paris, Berlin, Madrid, Rome, Vienna, Prague, Warsaw, Budapest, Lisbon, Dublin, Brussels, Amsterdam,
Copenhagen, Stockholm, Oslo, Helsinki, Athens, Istanbul, Moscow, Kyiv, Tokyo, Osaka, Kyoto, Beijing, Shanghai,
Shenzhen, Seoul, Busan, Mumbai, Delhi, Bangalore, Chennai, Kolkata, Karachi, Lahore, Dhaka, Bangkok, Hanoi, Jakarta,
Manila, Sydney, Melbourne, Brisbane, Perth, Auckland, Wellington, Cairo, Lagos, Nairobi, Accra, Johannesburg, Cape
Town, Casablanca, Tunis, Addis Ababa, New York, Los Angeles, Chicago, Houston, Phoenix, Philadelphia, San Antonio, San
Diego, Dallas, Austin, San Francisco, Seattle, Denver, Boston, Nashville, Baltimore, Portland, Las Vegas, Milwaukee,
Albuquerque, Sacramento, Kansas City, Atlanta, Miami, Cleveland, Minneapolis, New Orleans, Tampa, Pittsburgh,
Cincinnati, Toronto, Montreal, Vancouver, Calgary, Ottawa, Winnipeg, Mexico City, Guadalajara, Bogotá, Lima, Santiago,
Buenos Aires, São Paulo, Rio de Janeiro, Brasília, Caracas, Quito, Havana, Munich, Hamburg, Frankfurt, Cologne,
Stuttgart, Düsseldorf, Leipzig, Dresden, Zürich, Geneva, Basel, Bern, Milan, Naples, Turin, Florence, Venice, Bologna,
Barcelona, Valencia, Seville, Bilbao, Lyon, Marseille, Toulouse, Nice, Bordeaux, Strasbourg, Lille, Manchester,
Birmingham, Leeds, Glasgow, Edinburgh, Liverpool, Bristol, Sheffield, Cardiff, Belfast, Oxford, Cambridge, Brighton,
Rotterdam, Utrecht, Antwerp, Ghent, Gothenburg, Malmö, Bergen, Aarhus, Tampere, Reykjavík, Kraków, Gdańsk, Wrocław,
Brno, Bratislava, Ljubljana, Zagreb, Belgrade, Sofia, Bucharest, Tallinn, Riga, Vilnius, Minsk, Tbilisi, Yerevan,
Baku, Tashkent, Kabul, Tehran, Baghdad, Damascus, Beirut, Amman, Jerusalem, Tel Aviv, Riyadh, Dubai, Doha, Muscat,
Springfield, Greenville, Fairview, Salem, Georgetown, Arlington, Ashland, Burlington, Clayton, Dover, Franklin,
Hudson, Kingston, Lexington, Milton, Newport, Oakland, Richmond, Riverside, Winchester
""")
REGIONS = _listed("""
Alabama, Alaska, Arizona, Arkansas, California, Colorado, Connecticut, Delaware, Florida, Hawaii, Idaho, Illinois,
Indiana, Iowa, Kansas, Kentucky, Louisiana, Maine, Maryland, Massachusetts, Michigan, Minnesota, Mississippi,
Missouri, Montana, Nebraska, Nevada, New Hampshire, New Jersey, New Mexico, North Carolina, North Dakota, Ohio,
Oklahoma, Oregon, Pennsylvania, Rhode Island, South Carolina, South Dakota, Tennessee, Texas, Utah, Vermont, Virginia,
Washington, West Virginia, Wisconsin, Wyoming, Ontario, Quebec, British Columbia, Alberta, Bavaria, Saxony, Tuscany,
Sicily, Catalonia, Andalusia, Normandy, Brittany, Provence, Kerala, Punjab, Gujarat, Queensland, Victoria, Yorkshire,
Cornwall, Kent, Europe, Asia, Africa, North America, South America, the Middle East, Scandinavia, the Balkans, Siberia
""")
PLACES = tuple(CITIES[:140])
NATIONALITIES = _listed("""
American, British, English, Scottish, Welsh, Irish, French, German, Italian, Spanish, Portuguese, Dutch, Belgian,
Swiss, Austrian, Danish, Swedish, Norwegian, Finnish, Icelandic, Polish, Czech, Slovak, Hungarian, Romanian,
Bulgarian, Greek, Turkish, Serbian, Croatian, Bosnian, Albanian, Slovenian, Macedonian, Russian, Ukrainian,
Belarusian, Estonian, Latvian, Lithuanian, Georgian, Armenian, Kazakh, Uzbek, Chinese, Japanese, Korean, Vietnamese,
Thai, Malaysian, Indonesian, Filipino, Indian, Pakistani, Bangladeshi, Nepalese, Iranian, Iraqi, Syrian, Lebanese,
Israeli, Jordanian, Saudi, Egyptian, Moroccan, Algerian, Tunisian, Libyan, Sudanese, Ethiopian, Somali, Kenyan,
Ugandan, Tanzanian, Nigerian, Ghanaian, Senegalese, Congolese, Angolan, Zimbabwean, South African, Australian,
Canadian, Mexican, Brazilian, Argentine, Argentinian, Chilean, Peruvian, Colombian, Venezuelan, Cuban, Jamaican,
Haitian, Bolivian, Ecuadorian, Samoan, Fijian, Afghan, Mongolian, Maltese, Chechen, Kurdish, Arab, European, Asian,
African, Latino, Hispanic, Jewish, Muslim, Christian, Catholic, Protestant, Buddhist, Hindu, Sikh, Democrat,
Republican
""")
ORGANIZATIONS = _listed("""
Google, Microsoft, Apple, Amazon, Facebook, IBM, Intel, Oracle, Netflix, Tesla, Toyota, Honda, BMW, Volkswagen,
Siemens, Bosch, Nestlé, Unilever, Pfizer, Novartis, Bayer, Sony, Samsung, Nokia, Ericsson, Boeing, Airbus, Walmart,
Target, Starbucks, Nike, Adidas, Visa, PayPal, Goldman Sachs, JPMorgan Chase, Barclays, HSBC, Deutsche Bank, Citibank,
Wells Fargo, Bank of America, NASA, NATO, UNICEF, UNESCO, the United Nations, the European Union, the World Bank, the
FBI, the CIA, the BBC, CNN, Reuters, the Red Cross, Greenpeace, Harvard University, Stanford University, MIT, Yale,
Oxford University, the New York Times, the Washington Post, the Guardian, Rolling Stone, Manchester United, Real
Madrid, the Supreme Court, Congress, the Senate, Parliament, the Ministry of Health, the Department of Justice, the
Royal Society, Spotify, Uber, Airbnb, Vodafone, Verizon, Disney, Warner Bros, Universal Pictures, Accenture, Deloitte,
McKinsey, Greenleaf, Redhat, Dropbox, Slack, Zoom, Salesforce, Lufthansa, Ryanair, Delta Air Lines, the Labour Party,
the Senate Committee
""")

# Parts of made names, addresses and sentences; in braces what the maker fills in.
LEGAL = _parted("""
Inc | Inc. | LLC | Ltd | Ltd. | Limited | Corp. | Corporation | Co. | Company | GmbH | AG | KG | S.A. | SA | SAS |
SARL | S.p.A. | S.r.l. | B.V. | NV | AB | AS | ApS | Oy | Oyj | PLC | plc | LLP | LP | Group | Holdings | & Co |
and Sons | & Sons | e.V. | Pty Ltd | Kft. | sp. z o.o. | s.r.o. | Partners | Associates
""")
FIELDS = _parted("""
Software | Solutions | Systems | Technologies | Labs | Consulting | Partners | Capital | Media | Foods | Motors |
Energy | Pharma | Logistics | Insurance | Airlines | Records | Studios | Networks | Robotics | Analytics | Health
| Dynamics | Foundation | Institute | Bank | Hotels | Press | Design | Ventures | Electronics | Chemicals | Bakery
| Orchestra | Theatre | Supplies | Transport
""")
PUBLIC = _parted("""
University of {city} | {city} University | {city} Hospital | St. {first} Hospital | {last} College | {city} High
School | Bank of {country} | {country} Airlines | Ministry of Transport | {city} City Council | {last} Foundation
| {city} United | {city} Chamber of Commerce | Museum of {city} | {last} Institute of Technology | National
{field} Agency | {city} Police Department | {country} Football Association | {city} Times | Royal {field} Society
| {last} Memorial Clinic | First National Bank of {city}
""")
STREETS = _parted("""
Street | St | St. | Avenue | Ave | Ave. | Road | Rd | Rd. | Lane | Ln | Drive | Dr | Boulevard | Blvd | Court | Ct
| Place | Pl | Square | Sq | Terrace | Way | Parkway | Pkwy | Circle | Highway | Hwy | Trail | Crescent | Close |
Gardens | Row | Mews | Hill | Green | Walk
""")
STREET_BEFORE = _parted("""
Rue | Rue de | Rue du | Avenue | Avenue de | Boulevard | Via | Viale | Piazza | Calle | Calle de | Avenida | Plaza
| Rua | Travessa | ul. | Ulica | Place | Quai | Chemin des | Carrer | Corso | al. | Paseo
""")
STREET_AFTER = _parted("""
straße | strasse | str. | weg | platz | gasse | allee | straat | laan | gatan | vägen | gade | vej | veien | gata
| katu | tie | gracht | ␣utca | ␣u. | ␣út | ova | ského | vägen | stræde
""")
STATES = _parted("""
AL | AK | AZ | AR | CA | CO | CT | DE | FL | GA | HI | ID | IL | IN | IA | KS | KY | LA | ME | MD | MA | MI | MN |
MS | MO | MT | NE | NV | NH | NJ | NM | NY | NC | ND | OH | OK | OR | PA | RI | SC | SD | TN | TX | UT | VT | VA |
WA | WV | WI | WY | ON | QC | BC | NSW | VIC | QLD
""")
TOWNS = _parted("""
{}ville | {}ton | {}burg | {}field | {}heim | {}stad | {}by | {}borg | {}ford | {}bury | {}mouth | {}dorf |
{}hausen | {}owo | {}ice | {}sk | New {} | Port {} | San {} | Saint-{} | Santa {} | Lake {} | Mount {} | {}
Springs | {} City | {} Falls | {} Beach | North {} | East {} | Bad {} | El {} | La {} | {}-sur-Mer | {}pur |
{}abad
""")
TITLES = _parted("""
Mr. | Mrs. | Ms. | Dr. | Prof. | Mr | Mrs | Ms | Dr | Miss | Sir | Professor | Captain | Senator | President |
Judge | Herr | Frau | Señor | Madame
""")
JOBS = _parted("""
engineer | nurse | software developer | head of sales | CEO | teacher | accountant | project manager | plumber |
attorney | chef | librarian | Chief Technology Officer | Electrician | Sales assistant | Data Scientist |
Marketing Manager | research assistant
""")
PARTICLES = _parted("""
de | van | von | van der | de la | da | bin | al | Mac | Di | ter
""")
STREET_WORDS = _parted("""
Oak | Elm | Main | High | Church | Mill | Park | Station | North | Lake | River | King's | Queen | Cedar | 5th |
42nd | 1st
""")
DOORS = _parted("""
Apt. {} | Suite {} | Apt {}B | Unit {} | #{} | Floor {} | Flat {}
""")
ENDINGS = _parted("soft | ly | Tech | Net | corp | Lab | io | 360 | Works | Hub | Base")
MAILS = _parted("example.com | mail.test | post.org")
MONTHS = _parted("January | March | April | June | October | December | Oct | May")
